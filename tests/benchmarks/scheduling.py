"""Row 9: what the pools and the driver cost with hundreds of workers: real pool and stage code, workers that only sleep."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from dataclasses import dataclass

import psutil

from pipeline.stages.stage1 import Stage1
from tests.benchmarks.bench import Check, Result, Size
from tests.benchmarks.simulated import Recorded, cluster, groups, simulate

WORKERS = (64, 512, 64)
LIMITS = {"vlm": {"max_inflight": 1}, "vdm": {"max_batch": 4, "max_inflight": 1}, "reward": {"max_inflight": 1}}
"""A worker does one call at a time, so that its work over its number is a bound; the artist's clips come in fours."""


@dataclass(frozen=True)
class Found:
    """One simulated rollout."""

    makespan_s: float
    bound_s: float
    requests: int
    cpu_s: float
    rss_mib: float


def rollout(samples: int, *, group_size: int, window: int | None = None, seed: int = 0, scale: float = 1.0) -> Found:
    """Carry ``samples`` groups through 64 + 512 + 64 workers; ``scale`` multiplies the recorded service times."""
    recorded = Recorded.load().service(seed)

    async def work() -> Found:
        loop = asyncio.get_running_loop()
        async with cluster(
            lambda pool, n: scale * recorded(pool, n), WORKERS, group_size=group_size, limits=LIMITS
        ) as found:
            began, cpu = loop.time(), time.process_time()
            await groups(Stage1(found.config, found.fleet), samples, window)
            spent = time.process_time() - cpu
            rss = psutil.Process().memory_info().rss / 2**20
            return Found(loop.time() - began, found.lower_bound_s(), found.requests, spent, rss)

    gc.collect()
    return simulate(work)


def measure(size: Size) -> Result:
    """Measure efficiency in simulated time, and the driver in seconds of this process."""
    full = size == "full"
    many, few, group, repeats = (100_000, 1_000, 8, 3) if full else (400, 100, 4, 2)
    efficient = [rollout(2048 if full else 256, group_size=group, seed=seed) for seed in range(repeats)]
    busy = [rollout(512 if full else 64, group_size=group, seed=seed, scale=1e-3) for seed in range(repeats)]
    # All wait in the queues at once: what a deep queue costs. Two captions per sample, so five requests.
    shallow = [rollout(few, group_size=2, seed=seed) for seed in range(repeats)]
    window = 2048 if full else 64
    before = rollout(many // 10, group_size=2, window=window)
    after = rollout(many, group_size=2, window=window)
    deep = rollout(many, group_size=2)
    per_request = statistics.median(found.cpu_s / found.requests for found in shallow)
    checks = (
        Check(
            "efficiency: the busiest pool's work ÷ its size ÷ makespan",
            tuple(found.bound_s / found.makespan_s for found in efficient),
            "≥",
            0.9,
        ),
        Check("driver, per CPU second", tuple(f.requests / f.cpu_s for f in busy), "≥", 2000, "requests/s"),
        Check(
            f"CPU per request with {many:,} samples waiting ÷ with {few:,}",
            (deep.cpu_s / deep.requests / per_request,),
            "≤",
            1.5,
        ),
        Check(f"memory after {many:,} samples ÷ after {many // 10:,}", (after.rss_mib / before.rss_mib,), "≤", 1.1),
    )
    figures = {
        "samples of the efficiency check": float(2048 if full else 256),
        "makespan, simulated s": statistics.median(f.makespan_s for f in efficient),
        "lower bound, simulated s": statistics.median(f.bound_s for f in efficient),
        f"CPU µs per request, {few:,} samples at once": 1e6 * per_request,
        f"CPU µs per request, {many:,} samples at once": 1e6 * deep.cpu_s / deep.requests,
        f"CPU µs per request, {many:,} samples, {window:,} at a time": 1e6 * after.cpu_s / after.requests,
        f"MiB after {many // 10:,} samples": before.rss_mib,
        f"MiB after {many:,} samples": after.rss_mib,
    }
    notes = (
        "`WorkerPool`, its dispatcher and `Stage1.group` are the run's own; workers stand behind the pool's transport and sleep for",
        "service times of `service_times.json`, on a clock that jumps. All captions differ, so G clips are drawn for each sample. A",
        "driver request is one answer of one pool; its CPU time includes the stage's own work (parsing, seeds, requests).",
    )
    return Result(checks, figures, notes)
