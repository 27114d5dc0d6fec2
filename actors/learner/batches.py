"""How a batch of experiences is cut into optimizer steps, ranks and micro-batches. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from actors.records import Experience

T = TypeVar("T")


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
    return [[i for group in piece for i in group] for piece in _cut(ordered, parts)] if parts else []


def plan_batch(items: Sequence[Experience], *, ranks: int, micro_batch: int, updates: int) -> list[RankPlan]:
    """Return a plan per rank. In each optimizer step every rank runs the same number of micro-batches.

    Items stay in their order, so that a rank and a micro-batch have groups as whole as can be: what a group shares (its
    prompt, its reference frames) is then prepared by few. Shards differ by at most one item; a shard is cut evenly into
    micro-batches of at most ``micro_batch`` items. A rank that has nothing to run pads with a copy of the step's first item.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("an update needs at least one experience")
    plans: list[RankPlan] = [[] for _ in range(ranks)]
    for part in split_groups(items, updates):
        shards = _cut(part, ranks)
        count = ceil(max(len(shard) for shard in shards) / micro_batch)
        for plan, shard in zip(plans, shards, strict=True):
            pieces = [tuple(piece) for piece in _cut(shard, count)]
            plan.append([MicroBatch(p) if p else MicroBatch((part[0],), real=False) for p in pieces])
    return plans


def prompts_read(groups: int, size: int, *, ranks: int, micro_batch: int) -> list[int]:
    """Return how many prompts are in each micro-batch of an optimizer step over ``groups`` groups of ``size``, rank by rank."""
    shards = _cut(range(groups * size), ranks)
    count = ceil(max(len(shard) for shard in shards) / micro_batch)
    pieces = [piece for shard in shards for piece in _cut(shard, count)]
    return [len({i // size for i in piece}) for piece in pieces if piece]


def _cut(row: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Return ``parts`` even pieces of ``row``, in order; some are empty where there is too little."""
    bounds = [round(k * len(row) / parts) for k in range(parts + 1)]
    return [row[a:b] for a, b in itertools.pairwise(bounds)]
