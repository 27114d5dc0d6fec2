"""A small run of its own process: an embedded Ray of three slots, a pool of two toy workers in their bundles, requests without end.

``python toy_run.py OUT`` serves until OUT/stop appears. It leaves OUT/answers.json, what Ray's metrics port says of the pool in
OUT/metrics.txt, and a line in OUT/processed for each request that a worker worked on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray

from actors.failures import attempt
from actors.pool import PoolSpec, WorkerInfo, WorkerPool, worker_info
from cluster.resources import Ask, PlacementPlan, place
from cluster.session import connect
from pipeline.config.machinery import ControlSection
from pipeline.control.monitor import supervised
from pipeline.control.record import new_record

IN_FLIGHT = 6


class Toy:
    """Answers a number with its square, slowly."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.log, self.version = name, Path(folder) / "processed", -1

    def setup(self) -> WorkerInfo:
        return worker_info(self.name, "cpu")

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        self.version = version
        return version

    def process(self, requests: list[int]) -> list[Any]:
        return [attempt(lambda number=number: self._square(number)) for number in requests]

    def _square(self, number: int) -> tuple[int, int]:
        time.sleep(0.05)
        with self.log.open("a") as file:
            file.write(f"{number} {self.name}\n")
        return number * number, self.version

    def weights_hash(self) -> str:
        return "toy"

    def ping(self) -> str:
        return "pong"


def toy_pool(out: Path, room: Any, **limits: Any) -> WorkerPool:
    """Return a pool of Toy workers of one slot each."""
    actor = ray.remote(Toy)
    return WorkerPool(
        "toy",
        lambda name: actor.options(**room.options("toy", name), max_restarts=0).remote(name, str(out)),
        PoolSpec(**{"workers": 2, "max_batch": 1} | limits),
    )


async def serve(out: Path, address: str) -> None:
    """Submit numbers, ``IN_FLIGHT`` at a time, until there is a file ``stop``."""
    answers: dict[int, tuple[int, int]] = {}
    numbers = iter(range(10**9))

    async def ask_on(pool: WorkerPool) -> None:
        while not (out / "stop").exists():
            number = next(numbers)
            assert number not in answers
            answers[number] = await pool.submit(number)

    record = new_record("toy-run", address)
    with place(PlacementPlan((Ask("toy", 2, 1.0),)), 30) as room:
        async with toy_pool(out, room) as pool:
            await pool.set_weights(7, None)
            async with supervised([pool], record, out, ControlSection(every_s=0.5, trace_every_s=1.0)):
                await asyncio.gather(*(ask_on(pool) for _ in range(IN_FLIGHT)))
                url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
                text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    lines = [line for line in text.splitlines() if line.startswith("ray_vans_pool")]
    (out / "metrics.txt").write_text("\n".join(lines))
    (out / "answers.json").write_text(json.dumps(answers))


def main(out: Path) -> None:
    """Run."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with connect("local", local_cpus=3, object_store_mib=128) as session:
        asyncio.run(asyncio.wait_for(serve(out, session.address), 250))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
