"""What workers have counted, and how often what frozen models make was reused: embeddings, reference latents, vision features."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from actors.pool.pool import WorkerPool
from pipeline.fleet.open import Fleet

Counts = Mapping[str, Mapping[str, Mapping[str, float]]]
"""What workers have counted since their start: pool → worker → counter → number."""

RATIOS = {"captions": "caption_hit_ratio", "references": "reference_hit_ratio", "videos": "video_hit_ratio"}
"""What is counted, as ``<name>`` (made) and ``<name>_asked``, and how the share of hits is called."""


def cache_metrics(fleet: Fleet, counts: Counts) -> dict[str, float]:
    """Return what was made since the start, and the share of what was asked for that needed no making.

    ``counts`` are the samplers'.
    """
    found = [added(counts["vlm"])]
    found.append(added(counts["vdm"]) if fleet.conditions is None else fleet.conditions.counters())
    metrics: dict[str, float] = {}
    for name, ratio in RATIOS.items():
        made, asked = (sum(counts.get(key, 0.0) for counts in found) for key in (name, f"{name}_asked"))
        if asked:
            metrics |= {f"cache/{name}": made, f"cache/{ratio}": 1.0 - made / asked}
    return metrics


async def worker_counts(fleet: Fleet) -> Counts:
    """Return what the samplers' live workers have counted."""
    pools = {"vlm": fleet.vlm, "vdm": fleet.vdm}
    found = await asyncio.gather(*(pool.call_all("counters") for pool in pools.values()))
    return dict(zip(pools, found, strict=True))


async def sums(pool: WorkerPool) -> dict[str, float]:
    """Return the counters of the live workers of ``pool``, added up."""
    return added(await pool.call_all("counters"))


def added(workers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of the workers' counters."""
    sums: dict[str, float] = {}
    for counts in workers.values():
        for name, value in counts.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
