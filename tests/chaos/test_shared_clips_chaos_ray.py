"""A sampler of two processes loses one of them, or one hangs: the pool replaces the whole and answers every request."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.records import RenderRequest
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.settings import VdmPoolSection
from actors.vdm.worker import VdmWorker
from tests.actors.vdm.test_peers_ray import peers
from tests.chaos.pool_harness import make_pool, run, until

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(900)]

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
REQUESTS = [RenderRequest("s", i, "the red circle rises", FRAMES, 9, 40, 2.0, noise_seed=i) for i in range(8)]


def kill_peer(worker: int) -> None:
    os.kill(peers(worker)[0].pid, signal.SIGKILL)


def kill_leader(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)


def stop_peer(worker: int) -> None:
    """It lives, and does nothing any more."""
    os.kill(peers(worker)[0].pid, signal.SIGSTOP)


@pytest.mark.parametrize("fault", [kill_peer, kill_leader, stop_peer])
def test_a_lost_or_hung_process_costs_the_worker_and_no_request(
    tiny_vdm_dir: Path, fault: Callable[[int], None]
) -> None:
    settings = VdmPoolSection(context_parallel=2)
    found: list[psutil.Process] = []

    async def story() -> None:
        spec = {"workers": 1, "max_batch": 2, "request_timeout_s": 30.0}
        pool = make_pool(
            "vdm", VdmWorker, str(tiny_vdm_dir), spec=spec, actor={"num_cpus": 0.5}, options={"settings": settings}
        )
        async with pool:
            asked = [asyncio.create_task(pool.submit(request)) for request in REQUESTS]
            await until(lambda: pool.stats().inflight > 0)
            (info,) = pool.infos().values()
            found.extend(peers(info.pid))
            fault(info.pid)
            clips = await asyncio.gather(*asked)
            assert pool.stats().restarts == 1
            (info,) = pool.infos().values()
            found.extend(peers(info.pid))
            expected = sample(VdmPolicy.load(tiny_vdm_dir), REQUESTS)
            for clip, other in zip(clips, expected, strict=True):
                assert np.abs(clip.frames.astype(int) - other.frames).max() <= 1

    run(story)
    assert len(found) == 2
    for process in found:  # a stopped one ends when it goes on
        if process.is_running() and process.status() == psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGCONT)
    _, alive = psutil.wait_procs(found, timeout=20)
    assert not alive, "no worker leaves a peer behind"
