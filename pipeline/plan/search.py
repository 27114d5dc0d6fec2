"""Which way to run a run: all numbers of GPUs up to those at hand, splits, staleness and batch, by cost and by time. Pure.

Each candidate is judged by the arithmetic of ``vans plan``: what does not fit into memory is left out. All candidates learn from as
many groups: one of twice the batch has half the steps. Whether it learns as much from them is not in the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.hardware import Hardware, Rates
from pipeline.config import RunConfig
from pipeline.plan.balance import Split
from pipeline.plan.demands import stage_demands
from pipeline.plan.measured import Measured
from pipeline.plan.models import Models
from pipeline.plan.plan import overrides, splits_of, with_overrides

STALENESS = (0, 1)
BATCHES = (1, 2, 4)
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Point:
    """One way to run a run, and what it takes."""

    hardware: Hardware
    staleness: int
    batch: int  # groups of a step, in multiples of the configured
    split: Split
    settings: str
    """The overrides that make it."""

    @property
    def run_s(self) -> float:
        """Seconds of all steps."""
        return self.split.run_s

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours: what it costs, but for the price."""
        return self.hardware.gpus * self.run_s / 3600


def search(
    config: RunConfig,
    hardware: Hardware,
    rates: Rates,
    models: Models,
    measured: Measured | None = None,
    *,
    batches: Sequence[int] = BATCHES,
) -> tuple[Point, ...]:
    """Return every way that fits, the cheapest first; of equal cost the fastest, then the one with the smaller batch."""
    found = []
    for staleness in STALENESS:
        for batch in batches:
            settings = _settings(config, staleness, batch)
            other = with_overrides(config, settings)
            stages = stage_demands(other, models, rates, measured)
            for part in _parts(hardware):
                for split in splits_of(other, part, models, stages):
                    if split.colocated and staleness:
                        continue  # who shares GPUs works one after another
                    told = [*settings, *overrides(other, split).split()]
                    found.append(Point(part, staleness, batch, split, " ".join(dict.fromkeys(told))))
    return tuple(sorted(found, key=lambda point: (point.gpu_hours, point.run_s, point.batch, point.staleness)))


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return those of ``points`` that no other one of the same batch beats in cost and in time, by batch, the cheapest first.

    A larger batch is no better way to run the same run: it is another run.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.batch, each.gpu_hours, each.run_s)):
        if not best or best[-1].batch != point.batch or point.run_s < best[-1].run_s:
            best.append(point)
    return tuple(best)


def _parts(hardware: Hardware) -> Iterator[Hardware]:
    """Yield 1 … all GPUs of a node, then whole nodes: a part of a node is seldom lent beside whole ones."""
    for count in range(1, hardware.per_node + 1):
        yield dataclasses.replace(hardware, nodes=1, per_node=count)
    for nodes in range(2, hardware.nodes + 1):
        yield dataclasses.replace(hardware, nodes=nodes)


def _settings(config: RunConfig, staleness: int, batch: int) -> list[str]:
    """Return the overrides of staleness and batch, as far as they differ from ``config``; a stage without steps has none."""
    told = []
    for name in STAGES:
        stage = getattr(config, name)
        if not stage.steps:
            continue
        if stage.rollout.max_staleness != staleness:
            told.append(f"{name}.rollout.max_staleness={staleness}")
        if batch > 1:
            told.append(f"{name}.rollout.prompts_per_step={batch * stage.rollout.prompts_per_step}")
            told.append(f"{name}.steps={max(1, round(stage.steps / batch))}")
    return told
