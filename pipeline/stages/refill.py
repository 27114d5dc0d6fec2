"""Dynamic sampling (DAPO, arXiv 2503.14476): groups without a gradient are replaced by groups of fresh samples.

Responsible for which groups count and how many to draw when. Not responsible for sampling (the stages) or for the
order of draws between steps (the loop's lock). Pure: no Ray, no clock.

Draws come in waves: a wave replaces every group that is still missing, within the budget, and all of its groups are
finished before the next one is drawn. So what is drawn depends on the rewards alone and never on who finishes first,
and the data cursor after a step is a function of the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.stages.groups import NO_GRADIENT, TOO_FEW, Group, LeftOut
from rewards.combine import combine_rewards


def has_gradient(group: Group | None, weights: Mapping[str, float], *, normalise: bool, min_group: int) -> bool:
    """Return whether ``group`` teaches anything: enough scored members whose total rewards are not all equal."""
    if group is None or len(group.members) < min_group:
        return False
    values = {name: np.array([m.scores.values[name] for m in group.members]) for name in weights}
    return bool(np.ptp(combine_rewards(values, weights, normalise=normalise)) > 0.0)


@dataclass
class Refill:
    """The groups of one step while they are being completed; at most ``budget`` are drawn in addition.

    Ask :meth:`missing`, draw as many samples, hand their groups to :meth:`add`; until nothing is missing.
    """

    groups: list[Group | None]
    weights: Mapping[str, float]
    normalise: bool
    min_group: int
    budget: int
    drawn: int = 0
    replaced: int = 0
    beside: list[LeftOut] = field(default_factory=list)
    """Groups without a gradient that were replaced, or were drawn to replace one."""

    def missing(self) -> int:
        """Return how many samples the next wave draws: 0 when all groups count, or the budget is spent."""
        return min(len(self._empty()), self.budget - self.drawn)

    def add(self, groups: Sequence[Group | None]) -> None:
        """Put the useful ones of a wave's ``groups`` in the places of the first groups without a gradient, in order.

        The wave is charged to the budget as it was asked for, even where fewer groups came of it: so waves end.
        """
        self.drawn += self.missing()
        useful = [g for g in groups if self._counts(g)]
        self._leave([g for g in groups if not self._counts(g)])
        for place, group in zip(self._empty(), useful, strict=False):
            self._leave([self.groups[place]])
            self.groups[place] = group
            self.replaced += 1

    def metrics(self) -> dict[str, float]:
        """Return what the refill did, as the step's metrics."""
        return {"rollout/refill_draws": float(self.drawn), "rollout/refilled_groups": float(self.replaced)}

    def _leave(self, groups: Sequence[Group | None]) -> None:
        for group in groups:
            if group is not None:
                self.beside.append(LeftOut(group, TOO_FEW if len(group.members) < self.min_group else NO_GRADIENT))

    def _empty(self) -> list[int]:
        return [i for i, group in enumerate(self.groups) if not self._counts(group)]

    def _counts(self, group: Group | None) -> bool:
        return has_gradient(group, self.weights, normalise=self.normalise, min_group=self.min_group)


def draw_key(step: int, wave: int) -> str:
    """Return what stands for the step in the seeds of its ``wave`` (0 draws the step's own samples, 1… its refills).

    Another wave has other seeds: a sample that comes up twice in a step, at the end of an epoch, is sampled anew.
    """
    return str(step) if wave == 0 else f"{step}+{wave}"


def step_of(key: str) -> int:
    """Return the step that :func:`draw_key` made ``key`` of."""
    return int(key.partition("+")[0])
