"""Noise schedules of the SDE, a row each: another one is another row. No torch: the configuration reads the names.

A row's ``scale`` is s(sigma), on a tensor of sigmas through its own methods. ``flow_sde`` says what a step does with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Schedule:
    """One schedule. ``says`` is its half sentence in the documentation."""

    says: str
    scale: Callable[[Any, Any, float], Any] | None
    """s(sigma) from (sigma, the grid's second sigma, level), of sigma's shape. None: a step keeps the coefficients of the marginal
    instead, its std being sigma' sin(level pi / 2) (arXiv 2509.05952)."""
    most: float = float("inf")
    """Largest level."""


SCHEDULES: dict[str, Schedule] = {
    "flow": Schedule(
        "a*sqrt(sigma/(1-sigma))",
        # At sigma = 1 the second sigma stands in the denominator.
        lambda sigma, second, level: level * (sigma / (1 - sigma.where(sigma < 1, second))).sqrt(),
    ),
    "wan": Schedule("linear from 0 at the data", lambda sigma, second, level: level * sigma),
    "dance": Schedule("constant", lambda sigma, second, level: sigma.new_full(sigma.shape, level)),
    "cps": Schedule("coefficients-preserving", None, most=1.0),
}

if TYPE_CHECKING:
    NoiseSchedule = str
else:
    NoiseSchedule = Literal[tuple(SCHEDULES)]
