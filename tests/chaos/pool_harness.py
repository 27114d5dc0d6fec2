"""What the chaos tests of pools share: pools of real actors, a toy worker with checkable answers, and traffic that checks them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray

from actors.failures import Ok
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo, worker_info
from tests.actors.pool.limits import limits

MIB = 1 << 20


def run(story: Callable[[], Awaitable[None]], seconds: float = 800.0) -> None:
    asyncio.run(asyncio.wait_for(story(), seconds))


async def until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


def whole(pool: WorkerPool) -> bool:
    stats = pool.stats()
    return stats.ready == stats.target == len(stats.workers)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def make_pool(
    name: str, cls: type, *args: Any, spec: dict[str, Any], actor: dict[str, Any], **options: Any
) -> WorkerPool:
    remote = ray.remote(cls)
    values = {"workers": 2, "start_timeout_s": 300.0, "request_timeout_s": 120.0, "probe_every_s": 1.0} | spec

    def make(worker: str) -> Any:
        return remote.options(max_restarts=0, **actor).remote(worker, *args, **options)

    return WorkerPool(name, make, *limits(**values))


class Squarer:
    """Answers a number with its square plus ``1000 × version``, its version, and where it runs."""

    def __init__(self, name: str, load_s: float = 0.0) -> None:
        self.name, self.load_s, self.version, self.bias = name, load_s, -1, 0.0

    def setup(self) -> WorkerInfo:
        return worker_info(self.name, "cpu", "hash")

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        time.sleep(self.load_s)
        self.bias = 0.0 if payload is None else float(ray.get(payload[0]))
        self.version = version
        return version

    def process(self, requests: list[Any]) -> list[Any]:
        found = []
        for number, seconds in requests:
            time.sleep(seconds)
            found.append(Ok((number * number + self.bias, self.version)))
        return found

    def weights_hash(self) -> str:
        return f"hash@{self.version}"

    def ping(self) -> str:
        return "pong"


@dataclass
class Traffic:
    """Submits numbers until it is told to stop, and judges every answer."""

    pool: WorkerPool
    version: int = 0
    submitted: int = 0
    answered: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    on: bool = True

    async def flow(self, lane: int, seconds: float) -> None:
        number = lane * 1_000_000
        while self.on:
            number += 1
            oldest = self.version
            self.submitted += 1
            value, version = await self.pool.submit((number, seconds))
            assert oldest <= version <= self.version, "weights older than those current at submission"
            assert value == number * number + 1000.0 * version
            self.answered += 1

    async def publish(self) -> None:
        self.version += 1
        await self.pool.set_weights(self.version, [ray.put(1000.0 * self.version)])
