"""From scored answers to figures: each metric's value with its interval, and the paired difference of two systems.

A metric is a :class:`Measure`: what it takes from the answers to one sample, and its value over many samples. Value,
interval and comparison are the same code for a mean, for corpus BLEU and for the Fréchet distance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.bootstrap import RESAMPLES, Estimate, estimate
from rewards.frechet import FrechetDistance, frechet_distance, repeated_frechet
from rewards.text import BLEU_ORDERS, bleu_counts, bleu_of

FRECHET = "frechet"
SAME = 1e-9
"""Two systems differ on a sample where their numbers do by more than this: the order of a sum is no difference."""


@dataclass(frozen=True, eq=False)
class Answered:
    """One answer with its numbers. ``values`` holds only what applies (a missing video has no CLIP-V).

    ``lost``: component → why it could not be computed.
    """

    id: str
    index: int
    kind: str
    caption: str
    reference: str
    values: dict[str, float]
    features: dict[str, np.ndarray] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """By how much one system is above another on the ``n`` samples that both have, with its 95% interval.

    ``differ`` counts the samples on which their numbers are not the same.
    """

    value: float
    n: int
    low: float | None
    high: float | None
    differ: int


class Measure(ABC):
    """One metric. ``least``: fewest samples it is defined for; ``centred``: see ``bootstrap.estimate``."""

    least: ClassVar[int] = 1
    resamples: ClassVar[int] = RESAMPLES
    centred: ClassVar[bool] = False

    @abstractmethod
    def rows(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return sample id → what the metric takes from its answers; samples without it are left out."""

    @abstractmethod
    def values(self, rows: Sequence[Any], draws: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the metric over each row of ``draws`` (R, n), numbers of ``rows``."""


@dataclass(frozen=True)
class Mean(Measure):
    """The mean over samples of ``name``, which is averaged over the answers to a sample first."""

    name: str

    def rows(self, answers: Sequence[Answered]) -> dict[str, float]:
        """See :class:`Measure`."""
        return {i: float(np.mean(v)) for i, v in _by_sample(answers, lambda a: a.values.get(self.name)).items()}

    def values(self, rows: Sequence[float], draws: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`Measure`."""
        return np.asarray(rows)[draws].mean(axis=1)


@dataclass(frozen=True)
class Bleu(Measure):
    """Corpus BLEU up to ``order``-grams: the counts of the drawn samples are added up."""

    resamples = 1000

    order: int

    def rows(self, answers: Sequence[Answered]) -> dict[str, NDArray[np.int64]]:
        """See :class:`Measure`."""
        found = _by_sample(answers, lambda a: bleu_counts(a.caption, a.reference))
        return {i: np.sum(v, axis=0) for i, v in found.items()}

    def values(self, rows: Sequence[NDArray[np.int64]], draws: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`Measure`."""
        return np.array([bleu_of(total, self.order) for total in np.stack(rows)[draws].sum(axis=1)])


@dataclass(frozen=True)
class Frechet(Measure):
    """Fréchet distance of the clips' features. A drawn sample brings its clip and its true clip."""

    least = 2
    resamples = 200
    centred = True

    extractor: str

    def rows(self, answers: Sequence[Answered]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See :class:`Measure`."""
        found = _by_sample(answers, lambda a: (a.features["clip"], a.features["target"]) if a.features else None)
        return {i: (np.stack([c for c, _ in pairs]), np.stack([t for _, t in pairs])) for i, pairs in found.items()}

    def values(self, rows: Sequence[Any], draws: NDArray[np.intp]) -> NDArray[np.float64]:
        """See :class:`Measure`."""
        clips, targets = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
        times = np.stack([np.bincount(draw, minlength=len(rows)) for draw in draws])
        return repeated_frechet(clips, targets, np.repeat(times, [len(row[0]) for row in rows], axis=1))

    def distance(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> FrechetDistance:
        """Return the distance over ``rows``, with its counts."""
        clips, targets = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
        return frechet_distance(clips, targets, self.extractor)


def measure(metric: str, extractor: str) -> Measure:
    """Return what computes ``metric`` (a name of the table)."""
    if metric == FRECHET:
        return Frechet(extractor)
    orders = {f"bleu_{order}": order for order in BLEU_ORDERS}
    return Bleu(orders[metric]) if metric in orders else Mean(metric)


def value_of(how: Measure, answers: Sequence[Answered], seed: int) -> Estimate | None:
    """Return the metric over ``answers`` with its interval, None where they have too little of it."""
    rows = list(how.rows(answers).values())
    if len(rows) < how.least:
        return None
    return estimate(lambda d: how.values(rows, d), len(rows), seed, resamples=how.resamples, centred=how.centred)


def difference_of(
    how: Measure, system: Sequence[Answered], baseline: Sequence[Answered], seed: int
) -> Difference | None:
    """Return ``system`` − ``baseline`` over the samples that both have, by a paired bootstrap; None where too few."""
    new, old = how.rows(system), how.rows(baseline)
    both = [i for i in new if i in old]
    if len(both) < how.least:
        return None
    a, b = [new[i] for i in both], [old[i] for i in both]
    found = estimate(
        lambda d: how.values(a, d) - how.values(b, d), len(both), seed, resamples=how.resamples, centred=how.centred
    )
    differ = sum(not _same(x, y) for x, y in zip(a, b))
    return Difference(found.value, found.n, found.low, found.high, differ)


def _by_sample(answers: Sequence[Answered], take: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for answer in answers:
        if (taken := take(answer)) is not None:
            found.setdefault(answer.id, []).append(taken)
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two rows are alike; the true clips of a Fréchet row are the same for both systems."""
    x, y = (np.asarray(row[0] if isinstance(row, tuple) else row, dtype=np.float64) for row in (a, b))
    return x.shape == y.shape and bool(np.abs(x - y).max() <= SAME)
