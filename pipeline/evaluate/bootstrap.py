"""Confidence intervals over samples by the bootstrap (Efron 1979): draw as many samples again, with repetitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 100  # resamples at once: bounds the memory for many samples

Statistic = Callable[[NDArray[np.intp]], NDArray[np.float64]]
"""Numbers of samples, (R, n) → the value over each row, (R,)."""


@dataclass(frozen=True)
class Estimate:
    """A metric's value over ``n`` samples, and its 95% interval (None where there is one sample)."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


def estimate(statistic: Statistic, n: int, seed: int, *, resamples: int = RESAMPLES, centred: bool = False) -> Estimate:
    """Return ``statistic`` over samples 0…n−1 with its percentile interval; ``seed`` makes it repeatable.

    ``centred`` moves the interval by what the resamples' mean is off the value: for a statistic that is biased by
    repetitions (a Fréchet distance grows when clips occur twice), so that only its spread is left.
    """
    if n < 1:
        raise ValueError("an estimate needs at least one sample")
    value = float(statistic(np.arange(n)[None])[0])
    if n == 1:
        return Estimate(value, 1)
    rng = np.random.default_rng(seed)
    sizes = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    again = np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])
    low, high = np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    shift = value - float(again.mean()) if centred else 0.0
    return Estimate(value, n, float(low) + shift, float(high) + shift)
