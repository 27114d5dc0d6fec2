"""Records how long the real workers of the tiny pair take: ``python -m tests.benchmarks.record`` writes service_times.json.

Some steps of stage 1 of the toy run, with its own pools, learner and limits. Every ``process`` call of a worker is noted with its
number of requests, and every update and publication of the learner.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import actors.pool.pool
from actors.pool.remote import RayTransport
from cluster.session import connect
from pipeline.config import load_config
from pipeline.data.toy.shards import write_toy
from pipeline.run.train import run_training
from tests.benchmarks.bench import machine
from tests.benchmarks.simulated import POOLS, RECORDED

STEPS = 12
CALLS: dict[str, list[tuple[int, float]]] = {pool: [] for pool in POOLS}


class RecordingTransport(RayTransport):
    """Notes the requests and the seconds of each call."""

    def __init__(self, pool: str) -> None:
        super().__init__(pool)
        self._calls = CALLS[pool]

    async def ask(self, handle: Any, method: str, args: tuple[Any, ...], *, timeout_s: float, who: str) -> Any:
        """As the real one."""
        began = time.perf_counter()
        answer = await super().ask(handle, method, args, timeout_s=timeout_s, who=who)
        if method == "process":
            self._calls.append((len(args[0]), round(time.perf_counter() - began, 5)))
        return answer


def main() -> None:
    """Run the toy run and write what was recorded."""
    actors.pool.pool.RayTransport = RecordingTransport  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        write_toy(Path(folder, "toy"), train=128, test=8, seed=0)
        overrides = [f"out={folder}/run", f"data.train={folder}/toy/train", f"data.eval={folder}/toy/test"]
        overrides += [f"stage1.steps={STEPS}", "stage2.steps=0", "tracking.clips_every=0", "checkpoint.every=0"]
        with connect(local_cpus=8):
            summary = run_training(load_config("toy", overrides))
    history = summary.stages["stage1"].history
    found = {
        "machine": machine(),
        "calls": CALLS,
        "update_s": [round(m["time/update_s"], 4) for m in history],
        "publish_s": [round(m["time/publish_s"], 4) for m in history],
    }
    RECORDED.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
