"""Confidence intervals of means over samples, by the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A metric's value over ``n``, and its 95% interval (None where there is none: corpus metrics, one sample)."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


def mean_estimate(values: Sequence[float], seed: int) -> Estimate:
    """Return the mean of ``values`` (one per sample, at least one) with its interval; ``seed`` makes it repeatable."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("a mean needs at least one value")
    if array.size == 1:
        return Estimate(float(array[0]), 1)
    draws = np.random.default_rng(seed).integers(array.size, size=(RESAMPLES, array.size))
    low, high = np.quantile(array[draws].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(array.mean()), array.size, float(low), float(high))
