"""Over seeds: mean and spread of every figure, and whether an expected order holds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.reproduce.spec import Ordering

Figures = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Row → group → metric → value, of one seed."""

LOWER_IS_BETTER = frozenset({"frechet"})
Verdict = Literal["holds", "one seed only", "within the spread", "does not hold", "not measured"]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, sample standard deviation (0 for one seed) and the number of seeds."""

    mean: float
    std: float
    n: int

    def text(self, digits: int = 3) -> str:
        """Return ``mean ± std``; a single seed has no spread to show."""
        return f"{self.mean:.{digits}f}" + (f" ± {self.std:.{digits}f}" if self.n > 1 else "")


@dataclass(frozen=True)
class Step:
    """One link of an ordering: how much better the first row is than the second, per seed (positive is better)."""

    better: str
    worse: str
    gaps: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """The gap over seeds."""
        return spread(self.gaps)

    @property
    def verdict(self) -> Verdict:
        """``holds`` where the mean gap is positive and larger than its spread between seeds."""
        if not self.gaps:
            return "not measured"
        gap = self.spread
        if gap.mean <= 0:
            return "does not hold"
        if gap.n == 1:
            return "one seed only"
        return "holds" if gap.mean > gap.std else "within the spread"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and spread of ``values`` (at least one)."""
    array = np.asarray(values, dtype=np.float64)
    return Spread(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else 0.0, array.size)


def over_seeds(seeds: Sequence[Figures], row: str, group: str, metric: str) -> Spread | None:
    """Return a figure over the seeds that have it; None where none has."""
    values = [s[row][group][metric] for s in seeds if metric in s.get(row, {}).get(group, {})]
    return spread(values) if values else None


def links(ordering: Ordering, seeds: Sequence[Figures], shown: Sequence[str], group: str = "all") -> list[Step]:
    """Return the ordering's pairs among the rows ``shown`` with their gaps, paired by seed."""
    sign = -1.0 if ordering.metric in LOWER_IS_BETTER else 1.0
    steps = []
    for better, worse in ordering.pairs(shown):
        gaps = []
        for figures in seeds:
            a, b = (figures.get(row, {}).get(group, {}).get(ordering.metric) for row in (better, worse))
            if a is not None and b is not None:
                gaps.append(sign * (a - b))
        steps.append(Step(better, worse, tuple(gaps)))
    return steps


def verdict(steps: Sequence[Step]) -> Verdict:
    """Return the weakest link's verdict."""
    if not steps:
        return "not measured"
    order: tuple[Verdict, ...] = ("not measured", "does not hold", "within the spread", "one seed only", "holds")
    return min((step.verdict for step in steps), key=order.index)
