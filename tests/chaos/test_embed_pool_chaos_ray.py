"""kill -9 of the embed worker in the middle of a request: every caption is embedded all the same, with the same bits."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.pool.errors import SampleFailed
from actors.records import RenderRequest
from actors.vdm.embed_worker import EmbedWorker
from actors.vdm.policy import VdmPolicy
from pipeline.fleet.conditions import Conditions
from tests.chaos.pool_harness import make_pool, run, until

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(900)]


class Slow(EmbedWorker):
    """Takes its time, so that a kill hits it at work."""

    def process(self, requests: Sequence[Any]) -> list[Any]:
        time.sleep(0.5)
        return super().process(requests)


def test_a_killed_embed_worker_loses_nothing(tiny_vdm_dir: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)
    captions = ["the red circle rises", "the blue square falls", "the green circle stops"]
    requests = [
        RenderRequest(f"s{i}", m, captions[(i + m) % 3], frames[i], 9, 4, 3.0, noise_seed=0)
        for i in range(6)
        for m in range(4)
    ]

    async def story() -> None:
        pool = make_pool("embed", Slow, str(tiny_vdm_dir), spec={"workers": 1, "max_batch": 2}, actor={"num_cpus": 0.5})
        async with pool:
            conditions = Conditions(pool.submit, 1 << 24)
            asked = [asyncio.create_task(conditions.of(request)) for request in requests]
            await until(lambda: pool.stats().inflight > 0)
            (info,) = pool.infos().values()
            os.kill(info.pid, signal.SIGKILL)
            found = await asyncio.gather(*asked)
            stats = pool.stats()
            assert stats.restarts >= 1 and stats.retries >= 1 and stats.failures["data"] == 0
            counts = conditions.counters()
            assert (counts["captions"], counts["references"]) == (4.0, 6.0)  # three captions and the negative prompt
            with pytest.raises(SampleFailed, match="caption is empty"):
                await conditions.of(RenderRequest("bad", 0, " ", frames[0], 9, 4, 1.0, noise_seed=0))
        policy = VdmPolicy.load(tiny_vdm_dir)
        for request, condition in zip(requests, found, strict=True):
            mine = policy.encode(request.caption, request.reference_frames, request.guidance).record()
            for name in ("text", "negative", "references"):
                assert np.array_equal(getattr(mine, name), getattr(condition, name))

    run(story)
