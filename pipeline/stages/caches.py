"""How often what frozen models make was reused: captions' embeddings, reference latents, the VLM's vision features."""

from __future__ import annotations

import asyncio

from actors.pool.pool import WorkerPool
from pipeline.fleet.open import Fleet

RATIOS = {"captions": "caption_hit_ratio", "references": "reference_hit_ratio", "videos": "video_hit_ratio"}
"""What is counted, as ``<name>`` (made) and ``<name>_asked``, and how the share of hits is called."""


async def cache_metrics(fleet: Fleet) -> dict[str, float]:
    """Return what was made since the start, and the share of what was asked for that needed no making."""
    samplers = [fleet.vlm] if fleet.conditions is not None else [fleet.vlm, fleet.vdm]
    found = list(await asyncio.gather(*(sums(pool) for pool in samplers)))
    if fleet.conditions is not None:
        found.append(fleet.conditions.counters())
    metrics: dict[str, float] = {}
    for name, ratio in RATIOS.items():
        made, asked = (sum(counts.get(key, 0.0) for counts in found) for key in (name, f"{name}_asked"))
        if asked:
            metrics |= {f"cache/{name}": made, f"cache/{ratio}": 1.0 - made / asked}
    return metrics


async def sums(pool: WorkerPool) -> dict[str, float]:
    """Return the counters of the live workers of ``pool``, added up."""
    sums: dict[str, float] = {}
    for counts in (await pool.call_all("counters")).values():
        for name, value in counts.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
