"""How a batch of experiences is cut into optimizer steps, ranks and micro-batches. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from actors.records import Experience


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Items of one forward and backward. ``real=False`` marks padding: it runs, so that collectives match, and weighs
    0.
    """

    items: tuple[Experience, ...]
    real: bool = True


RankPlan = list[list[MicroBatch]]
"""What one rank runs: for each optimizer step its micro-batches."""


def split_groups(items: Sequence[Experience], parts: int) -> list[list[Experience]]:
    """Split ``items`` by group (sample id, in order of first appearance) into at most ``parts`` even, non-empty parts.

    A group is never cut: its advantages sum to zero only as a whole.
    """
    groups: dict[str, list[Experience]] = {}
    for item in items:
        groups.setdefault(item.sample_id, []).append(item)
    ordered = list(groups.values())
    parts = min(parts, len(ordered))
    bounds = [round(k * len(ordered) / parts) for k in range(parts + 1)] if parts else []
    return [[i for group in ordered[a:b] for i in group] for a, b in itertools.pairwise(bounds)]


def plan_batch(items: Sequence[Experience], *, ranks: int, micro_batch: int, updates: int) -> list[RankPlan]:
    """Return a plan per rank. In each optimizer step every rank runs the same number of micro-batches.

    Items are dealt out in turn, so shards differ by at most one item; a shard is cut evenly into micro-batches of at
    most ``micro_batch`` items. A rank that has nothing to run pads with a copy of the step's first item.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("an update needs at least one experience")
    plans: list[RankPlan] = [[] for _ in range(ranks)]
    for part in split_groups(items, updates):
        shards = [part[rank::ranks] for rank in range(ranks)]
        count = ceil(len(shards[0]) / micro_batch)  # shard 0 is a largest one
        for plan, shard in zip(plans, shards):
            bounds = [round(k * len(shard) / count) for k in range(count + 1)]
            pieces = [tuple(shard[a:b]) for a, b in itertools.pairwise(bounds)]
            plan.append([MicroBatch(p) if p else MicroBatch((part[0],), real=False) for p in pieces])
    return plans
