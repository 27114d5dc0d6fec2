"""What rewards with models spent, of those that count it: a judge's asks, its tokens and their price."""

from __future__ import annotations

import asyncio

from pipeline.fleet.kinds import KINDS
from pipeline.fleet.open import Fleet
from pipeline.stages.caches import sums


async def spend_metrics(fleet: Fleet) -> dict[str, float]:
    """Return the counters of each reward's pool, since the start, over the workers that live."""
    if fleet.scoring is None:  # no reward has a model of its own
        return {}
    pools = {name: pool for name, pool in fleet.named.items() if name not in KINDS}
    counted = await asyncio.gather(*(sums(pool) for pool in pools.values()))
    return {
        f"spend/{name}/{what}": value
        for name, counts in zip(pools, counted, strict=True)
        for what, value in counts.items()
    }
