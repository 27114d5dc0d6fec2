"""The gradient of a supervised step is that of its whole batch, however the batch is cut into micro-batches and ranks.

The reference is the unsharded policy and one backward. Each rank is another process, sharded as in a run, and joins its
peers by gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.sharding import free_address, join_group, shard
from actors.learner.supervised import accumulate
from actors.policy.protocol import trainable_parameters
from actors.records import VideoQuestion
from actors.vdm.policy import VdmPolicy
from actors.vlm.policy import VlmPolicy

pytestmark = pytest.mark.slow

WORDS = (1, 14, 3, 1, 9, 2, 1, 30)
"""Words of the answers: the first half of the batch has fewer tokens than the second, and every micro-batch others."""
HOST = "127.0.0.1"


def thinker_batch() -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(0)
    return [
        (VideoQuestion("what comes next?", rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), 2.0), "ball " * words)
        for words in WORDS
    ]


def artist_batch() -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8) for _ in range(4)]
    return [(clip[:2], f"ball {i}", clip[2:]) for i, clip in enumerate(clips)]


POLICIES: dict[str, tuple[Any, Any]] = {"vlm": (VlmPolicy, thinker_batch), "vdm": (VdmPolicy, artist_batch)}


def whole(gradients: Sequence[Tensor | None]) -> list[np.ndarray]:
    """Return the gradients, gathered. Collective where they are sharded."""
    full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients if g is not None]
    return [g.numpy() for g in full]


def step(kind: str, folder: Path, mesh: DeviceMesh, micro: int | None) -> tuple[float, list[np.ndarray]]:
    """Be one rank for one step; returns the loss and the gradients. Collective."""
    policy_class, make = POLICIES[kind]
    rank, world = mesh.get_local_rank(), mesh.size()
    policy, batch = policy_class.load(folder), make()
    shard(policy.module, policy.fsdp_units, mesh, torch.float32, False)
    parameters = trainable_parameters(policy.module)
    share = len(batch) // world
    torch.manual_seed(3)
    part = batch[rank * share : (rank + 1) * share]
    loss = accumulate(policy, [policy.module], part, micro, parameters, world)
    return loss, whole([p.grad for p in parameters])


def journey(kind: str, folder: Path, rank: int, world: int, address: str, micro: int | None) -> Any:
    """Be one rank in a process of its own."""
    torch.set_num_threads(1)
    result = step(kind, folder, join_group(address, rank, world, HOST, 60.0, torch.device("cpu")), micro)
    dist.destroy_process_group()
    return result


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    yield join_group(free_address(HOST), 0, 1, HOST, 60.0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield pool


@pytest.fixture(scope="module")
def folders(tiny_vlm_dir: Path, tiny_vdm_dir: Path) -> dict[str, Path]:
    return {"vlm": tiny_vlm_dir, "vdm": tiny_vdm_dir}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, tuple[float, list[np.ndarray]]]:
    """Loss and gradients of the whole batch at once, unsharded."""
    found = {}
    for kind, (policy_class, make) in POLICIES.items():
        policy = policy_class.load(folders[kind])
        torch.manual_seed(3)
        loss = policy.sft_loss(make())
        (loss.total / loss.count).backward()
        if kind == "vlm":
            tokens = [len(policy.answer_tokens(answer)) for _, answer in make()]
            assert loss.count == sum(tokens) and sum(tokens[:4]) < sum(tokens[4:])
        found[kind] = float(loss.mean.detach()), whole([p.grad for p in trainable_parameters(policy.module)])
    return found


def compare(expected: tuple[float, list[np.ndarray]], found: tuple[float, list[np.ndarray]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found[1]) == len(expected[1]) > 20
    scale = max(float(np.abs(g).max()) for g in expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", POLICIES)
def test_micro_batches_add_up(kind: str, micro: int, mesh: DeviceMesh, folders: Any, expected: Any) -> None:
    compare(expected[kind], step(kind, folders[kind], mesh, micro))


@pytest.mark.parametrize("micro", [None, 1])
def test_ranks_add_up(micro: int | None, processes: ProcessPoolExecutor, folders: Any, expected: Any) -> None:
    address = free_address(HOST)
    calls = [processes.submit(journey, "vlm", folders["vlm"], rank, 2, address, micro) for rank in range(2)]
    for call in calls:
        compare(expected["vlm"], call.result(timeout=120))
