"""A small run of its own process: an embedded Ray of three slots, a pool ``toy`` of two workers in their bundles, a pool ``auto`` that
sizes itself and takes no slots, requests without end.

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
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo, worker_info
from actors.pool.settings import AutoscaleSection, PoolSection
from cluster.resources import Ask, PlacementPlan, place
from cluster.session import connect
from pipeline.config.machinery import ControlSection
from pipeline.control.monitor import supervised
from pipeline.control.record import new_record

IN_FLIGHT = {"toy": 6, "auto": 4}
LIMITS = {"auto": AutoscaleSection(enabled=True, max=2, target_wait_s=0.1, cooldown_s=2.0)}


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


def toy_pool(name: str, out: Path, room: Any, workers: int) -> WorkerPool:
    """Return a pool of Toy workers."""
    actor = ray.remote(Toy)
    return WorkerPool(
        name,
        lambda worker: actor.options(**room.options(name, worker), max_restarts=0).remote(worker, str(out)),
        PoolSection(workers=workers, max_batch=1),
    )


async def serve(out: Path, address: str) -> None:
    """Submit numbers, ``IN_FLIGHT`` at a time, until there is a file ``stop``."""
    answers: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in IN_FLIGHT}
    numbers = iter(range(10**9))

    async def ask_on(pool: WorkerPool) -> None:
        while not (out / "stop").exists():
            number = next(numbers)
            answers[pool.name][number] = await pool.submit(number)

    record = new_record("toy-run", address)
    settings = ControlSection(every_s=0.5, trace_every_s=0.5)
    with place(PlacementPlan((Ask("toy", 2, 1.0), Ask("auto", 1, 0.0))), 30) as room:
        async with toy_pool("toy", out, room, 2) as toy, toy_pool("auto", out, room, 1) as auto:
            await toy.set_weights(7, None)
            async with supervised([toy, auto], record, out, settings, LIMITS):
                await asyncio.gather(*(ask_on(pool) for pool in (toy, auto) for _ in range(IN_FLIGHT[pool.name])))
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
