"""Row 6: from trained tensors to every worker serving them, beside copying the same bytes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
import torch

from actors.failures import Ok
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo, worker_info
from actors.pool.settings import PoolSection
from actors.weights.transport import fetch, pack, send
from tests.benchmarks.bench import Check, Result, Size, interleave_async, medians, start_ray

WORKERS = 4
TENSORS = 50


def parameters(values: int) -> dict[str, torch.Tensor]:
    """Return ``TENSORS`` float32 tensors of ``values`` elements."""
    return {f"layer.{i}.weight": torch.full((values,), float(i)) for i in range(TENSORS)}


class Holder:
    """A worker that holds parameters, and takes published ones as the artist's worker does: fetched, then copied into place."""

    def __init__(self, name: str, values: int) -> None:
        self.name, self.parameters = name, parameters(values)

    def setup(self) -> WorkerInfo:
        """Nothing to load."""
        torch.set_num_threads(1)
        return worker_info(self.name, "cpu")

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Copy what was published into the parameters."""
        if payload is not None:
            for name, tensor in fetch(payload).tensors.items():
                self.parameters[name].copy_(tensor)
        return version

    def process(self, requests: list[str]) -> list[Any]:
        """Answer with the sum of the named parameters."""
        return [Ok(float(self.parameters[name].sum())) for name in requests]

    def ping(self) -> str:
        """It lives."""
        return self.name


async def publish(size: Size) -> tuple[list[tuple[float, ...]], float]:
    """Return seconds of ours and of the copies, round by round, and the MB that were published."""
    values, repeats = (1_000_000, 9) if size == "full" else (10_000, 1)
    tensors = parameters(values)
    places = [parameters(values) for _ in range(WORKERS)]
    actor = ray.remote(Holder)
    spec = PoolSection(workers=WORKERS, max_batch=1)
    version = 0
    async with WorkerPool("holder", lambda name: actor.options(num_cpus=0.5).remote(name, values), spec) as pool:

        async def ours() -> float:
            nonlocal version
            version += 1
            for tensor in tensors.values():
                tensor += 1.0
            began = time.perf_counter()
            await pool.set_weights(version, send(pack(version, "full", tensors)))
            spent = time.perf_counter() - began
            answers = await asyncio.gather(*(pool.submit("layer.7.weight") for _ in range(WORKERS)))
            assert set(answers) == {float(tensors["layer.7.weight"].sum())}, "the new weights serve"
            return spent

        async def copies() -> float:
            began = time.perf_counter()
            for place in places:
                for name, tensor in tensors.items():
                    place[name].copy_(tensor)
            return time.perf_counter() - began

        rounds = await interleave_async([ours, copies], repeats)
    return rounds, TENSORS * values * 4 / 1e6


def measure(size: Size) -> Result:
    """Measure seconds from the learner's tensors until all workers serve."""
    start_ray(object_store_mib=1024)
    torch.set_num_threads(1)
    rounds, megabytes = asyncio.run(publish(size))
    checks = (Check("(publication − 50 ms) ÷ memcpy", tuple((a - 0.05) / b for a, b in rounds), "≤", 3.0),)
    figures = {"MB published": megabytes, "workers": float(WORKERS)}
    figures |= medians(rounds, "publication until all serve, s", "memcpy, s")
    notes = (
        "Ours: one copy into Ray's object store, then each worker, a process of its own, copies out of shared memory and into its",
        "parameters, as the artist's does; ended when the pool says that all serve. memcpy: the same tensors copied once for each",
        "worker, one copy after another on one thread of one process.",
    )
    return Result(checks, figures, notes)
