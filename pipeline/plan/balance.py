"""How long a step takes with given GPUs, and the split of GPUs that makes it shortest. Pure arithmetic over demands.

A step's stages overlap like this:

* synchronous (``max_staleness: 0``): the completions of all groups decode together, then clips are drawn and scored as they come
  (the slower of the two counts), then the learner learns;
* with staleness: pools and learner work on different steps at a time, so the slowest stage counts;
* colocated: one after another, each on all GPUs, with the time that it takes to move weights off the GPUs and on again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import PlacementError

ROLES = ("vlm", "vdm", "reward", "learner")
"""What GPUs are split over. Every other pool stands with the scorers (:func:`standing`): they are small beside these."""


@dataclass(frozen=True)
class Demand:
    """What one stage of a step asks of one role: ``units`` pieces of work, each ``unit_s`` GPU-seconds.

    ``fixed_s`` seconds pass however many GPUs there are (reading weights for each token, publishing). A unit is not shared
    between GPUs, so seconds(n) = fixed_s + ceil(units / n) unit_s.
    """

    name: str
    role: str
    units: float
    unit_s: float
    fixed_s: float = 0.0
    source: str = ""
    """For people: where the seconds come from."""

    def seconds(self, workers: float) -> float:
        """Return the seconds with ``workers`` GPUs (engines, ranks); infinite with none."""
        if self.units <= 0:
            return 0.0
        if workers <= 0:
            return math.inf
        # A share below 1 slows a worker down; above it, whole units are dealt out.
        rounds = math.ceil(self.units / workers) if workers >= 1 else self.units / workers
        return self.fixed_s + rounds * self.unit_s


@dataclass(frozen=True)
class StageDemand:
    """A stage of the run: its demands in the order of a step, how many steps it has, and whether rollouts run ahead."""

    name: str
    steps: int
    demands: tuple[Demand, ...]
    ahead: bool
    """max_staleness > 0: pools and learner work on different steps at the same time."""
    switch_s: float = 0.0
    """Seconds of a step in which colocated roles make way for each other."""

    def seconds(self, workers: Mapping[str, float], *, colocated: bool = False) -> float:
        """Return the seconds of a step with ``workers`` per role."""
        each = {demand.name: demand.seconds(workers.get(demand.role, 0.0)) for demand in self.demands}
        return float(self.combine({name: np.asarray(value) for name, value in each.items()}, colocated=colocated))

    def combine(self, seconds: Mapping[str, np.ndarray], *, colocated: bool = False) -> np.ndarray:
        """Return the step's seconds from those of its demands, by name."""
        by_role: dict[str, np.ndarray] = {}
        for demand in self.demands:
            role = standing(demand.role)
            by_role[role] = by_role.get(role, np.asarray(0.0)) + seconds[demand.name]
        parts = [by_role.get(role, np.asarray(0.0)) for role in ROLES]
        if colocated:
            return sum(parts, np.asarray(self.switch_s))
        vlm, vdm, reward, learner = parts
        rollout = vlm + np.maximum(vdm, reward)
        if not self.ahead:
            return rollout + learner
        return np.maximum(np.maximum(vlm, np.maximum(vdm, reward)), learner)

    def bottleneck(self, workers: Mapping[str, float]) -> Demand:
        """Return the demand that takes longest."""
        return max(self.demands, key=lambda demand: demand.seconds(workers.get(demand.role, 0.0)))


@dataclass(frozen=True)
class Split:
    """GPUs per role, and the seconds of a step of each stage with them."""

    gpus: Mapping[str, int]
    step_s: Mapping[str, float]
    run_s: float
    """All steps of all stages."""
    colocated: bool = False
    engine_share: float = 0.85
    """Colocated: the VLM engine's share of a GPU's memory."""


def best_split(
    stages: Sequence[StageDemand],
    gpus: int,
    *,
    least: Mapping[str, int] | None = None,
    each: Mapping[str, int] | None = None,
) -> Split:
    """Return the split of ``gpus`` over the four roles, each on GPUs of its own, that makes the run shortest.

    ``least``: fewest GPUs of a role (its memory; 1 by default). ``each``: GPUs of one VLM engine, of one sampler, and the learner's
    on which one clip lies (1 by default). All splits are tried, so none is better; of equal ones the first in the order (learner,
    vlm, reward) with the fewest there is taken.

    Raises PlacementError where the GPUs are too few.
    """
    together = {role: (each or {}).get(role, 1) for role in ROLES}
    fewest = {role: max((least or {}).get(role, 1), together[role]) for role in ROLES}
    workers = {
        role: together[role] if role in ("vlm", "vdm") else 1 for role in ROLES
    }  # a learner's demand is of its ranks
    if sum(fewest.values()) > gpus:
        told = ", ".join(f"{role} {count}" for role, count in fewest.items())
        raise PlacementError(
            f"{gpus} GPU(s) are too few for GPUs of their own for every role ({told}); share them (cluster.layout=colocated)"
        )
    tables = [
        {
            demand.name: np.array([demand.seconds(n // workers[standing(demand.role)]) for n in range(gpus + 1)])
            for demand in stage.demands
        }
        for stage in stages
    ]
    learner, vlm, reward = np.meshgrid(*[np.arange(gpus + 1)] * 3, indexing="ij")
    counts = {"vlm": vlm, "vdm": gpus - learner - vlm - reward, "reward": reward, "learner": learner}
    allowed = np.logical_and.reduce([counts[role] >= fewest[role] for role in ROLES])
    allowed &= np.logical_and.reduce([counts[role] % together[role] == 0 for role in ROLES])
    total = np.zeros(vlm.shape)
    for stage, table in zip(stages, tables):
        seconds = {d.name: table[d.name][np.maximum(counts[standing(d.role)], 0)] for d in stage.demands}
        total = total + stage.steps * stage.combine(seconds)
    total = np.where(allowed, total, np.inf)
    best = np.unravel_index(int(np.argmin(total)), total.shape)
    split = {role: int(counts[role][best]) for role in ROLES}
    at_work = {role: split[standing(role)] // workers[standing(role)] for role in {*_asked(stages), "vlm"}}
    return Split(split, {stage.name: stage.seconds(at_work) for stage in stages}, float(total[best]))


def shared_split(stages: Sequence[StageDemand], gpus: int) -> Split:
    """Return what colocated roles come to: each stage of a step on all ``gpus``, one after another."""
    everywhere = dict.fromkeys(_asked(stages), gpus)
    step_s = {stage.name: stage.seconds(everywhere, colocated=True) for stage in stages}
    return Split(
        dict.fromkeys(ROLES, gpus), step_s, sum(stage.steps * step_s[stage.name] for stage in stages), colocated=True
    )


def standing(role: str) -> str:
    """Return which of ROLES ``role`` shares its GPUs with in a split."""
    return role if role in ROLES else "reward"


def _asked(stages: Sequence[StageDemand]) -> set[str]:
    return {demand.role for stage in stages for demand in stage.demands}
