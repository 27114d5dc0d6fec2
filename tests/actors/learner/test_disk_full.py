"""A rank that cannot write fails the checkpoint on all ranks alike, and the group learns and saves again afterwards.

Two real ranks in processes of their own, joined by gloo. RLIMIT_FSIZE on one of them makes the kernel refuse its writes (EFBIG),
inside torch's and safetensors' own writers, as a full disk does with ENOSPC.
"""

from __future__ import annotations

import errno
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from actors.learner.batches import RankPlan, plan_batch
from actors.learner.rank import LearnerRank
from actors.policy.settings import LoraSection
from cluster.errors import CheckpointWriteError
from cluster.storage import write_failure
from tests.actors.learner.test_parity_ranks import SPEC
from tests.actors.learner.toy_policy import changed, experiences

pytestmark = pytest.mark.slow

TWO = changed(replace(SPEC, lora=LoraSection(rank=2, alpha=8.0)), ranks=2)
UNLIMITED = resource.RLIM_INFINITY


def live_through_it(rank: int, address: str, plan: RankPlan, folder: str) -> list[str]:
    """Be one rank whose disk is full for a while; returns how each attempt to write ended."""
    learner, told = LearnerRank(TWO, rank), []
    learner.setup(address)
    for full, method in ((1, "save"), (0, "save"), (0, "export")):
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (256, UNLIMITED))
        try:
            getattr(learner, method)(f"{folder}/{method}{full}")
            told.append("written")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    learner.update(plan, 1)
    learner.save(f"{folder}/after")
    told.append(f"version {learner.restore(f'{folder}/after')}")
    learner.leave()
    return told


def test_one_full_disk_fails_the_checkpoint_on_both_ranks_and_neither_hangs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    address, plans = (
        LearnerRank(TWO, 0).pick_address(),
        plan_batch(experiences(2, 3), ranks=2, micro_batch=32, updates=1),
    )
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        calls = [pool.submit(live_through_it, r, address, plans[r], str(tmp_path)) for r in range(2)]
        first, second = (call.result(timeout=120) for call in calls)
    assert (
        first[0] == second[0]
        and f"CheckpointWriteError: learner: rank 1 could not write to {tmp_path}/save1" in first[0]
    )
    assert first[1] == second[1] and "CheckpointWriteError: learner: rank 0 could not write" in first[1]
    assert "CheckpointWriteError: learner: rank 0 could not write" in first[2] and "could not write" in second[2]
    assert first[3] == second[3] == "version 1"


def wrapped(cause: BaseException) -> Exception:
    try:
        try:
            raise cause
        except BaseException as error:
            raise RuntimeError("while saving") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (wrapped(OSError(errno.EIO, "Input/output error")), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),  # torch.save into a path
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), True),  # safetensors
        (TypeError("cannot pickle a generator"), False),
        (ConnectionResetError("reset by peer"), False),
        (CheckpointWriteError("learner: rank 0 could not write: File too large"), True),
    ],
)
def test_which_errors_are_the_disks(error: Exception, is_one: bool) -> None:
    assert (write_failure(error) is not None) == is_one
