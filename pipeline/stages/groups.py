"""From scored groups to what a learner reads: totals, advantages, and the metrics of a batch. Pure: no Ray, no clock.

A member whose score could not be computed has left its group before it gets here; a group below the minimum size is dropped
and counted. A reward is never imputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from actors.records import Clip, Completion, Sample, Scores
from cluster.errors import TrainingError
from pipeline.stages.advantages import group_advantages
from rewards.combine import combine_rewards
from rewards.signs import component_correlations


class Span(NamedTuple):
    """A request from its sending to its answer, waiting in the queue included."""

    began: float  # of ``time.monotonic()`` in the driver
    seconds: float


@dataclass(frozen=True, eq=False)
class Member:
    """One trajectory of a group with its scores; a completion (stage 1) or a clip with its trajectory (stage 2)."""

    index: int
    caption: str
    scores: Scores
    completion: Completion | None = None
    clip: Clip | None = None
    weights_version: int = 0
    seeds: Mapping[str, int] = field(default_factory=dict)
    """What it was sampled with: ``text``, ``noise``, ``sde``, as far as it was."""
    spans: Mapping[str, Span] = field(default_factory=dict)
    """When its requests were under way: ``text``, ``render``, ``score``."""


@dataclass(frozen=True, eq=False)
class Group:
    """All scored members for one sample, and what was lost on the way."""

    sample: Sample
    members: tuple[Member, ...]
    failures: tuple[str, ...] = ()
    """The reason of each trajectory that was lost; of all of them, where nothing could be asked about the sample."""
    text: str = ""
    """What the frozen thinker wrote for all members (stage 2); empty where each has a completion of its own."""


TOO_FEW = "its group has too few scored members to compare (grpo.min_group)"
NO_GRADIENT = "the rewards of its group are all equal, and a refill was drawn for it (rollout.max_refills)"


@dataclass(frozen=True, eq=False)
class LeftOut:
    """A group that was drawn for a step and that nothing learns from. ``caption``: of one without members, the anchor's."""

    group: Group
    reason: str
    caption: str | None = None


MAX_EMPTY_BATCHES = 5
"""Batches in a row without a single trajectory that stop a stage; one may be a single odd sample."""
JUDGED = 100
"""Trajectories from which on the share of lost ones is judged; fewer are too few for a share."""


@dataclass
class FailureBudget:
    """Bounds what a stage may lose to requests that can never succeed, counted from the start of the stage, or its restart."""

    stage: str
    limit: float
    """Largest share of trajectories that may be lost, 0…1."""
    asked: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Lost trajectories by reason."""
    empty_batches: int = 0
    """Batches in a row of which nothing could be had."""

    def count(self, groups: Sequence[Group | None], before: Sequence[str] = ()) -> Counter[str]:
        """Count ``groups`` and return what was lost in them, and ``before`` there were groups, by reason.

        Raises TrainingError when more than the allowed share is lost, or everything in MAX_EMPTY_BATCHES batches in a row.
        """
        new = Counter([*before, *(reason for g in groups if g is not None for reason in g.failures)])
        kept = sum(len(g.members) for g in groups if g is not None)
        self.asked += kept + new.total()
        self.lost += new
        self.empty_batches = self.empty_batches + 1 if new.total() and not kept else 0
        if self.empty_batches == MAX_EMPTY_BATCHES:
            raise TrainingError(
                f"{self.stage}: not one trajectory of {MAX_EMPTY_BATCHES} batches in a row could be had.{self._reasons(self.lost)}"
            )
        if self.lost.total() > self.limit * max(self.asked, JUDGED):
            raise TrainingError(
                f"{self.stage}: {self.lost.total()} of {self.asked} trajectories were lost because their requests cannot "
                f"succeed; the limit is rollout.max_failed_ratio={self.limit:g}.{self._reasons(self.lost)}"
            )
        return new

    @staticmethod
    def _reasons(lost: Counter[str]) -> str:
        return " The most frequent reasons:" + "".join(f"\n  {n} × {reason}" for reason, n in lost.most_common(5))


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """What one step learns from: groups, advantages per group, and metrics."""

    groups: tuple[Group, ...]
    totals: tuple[np.ndarray, ...]
    advantages: tuple[np.ndarray, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    """What was drawn for the step beside ``groups``."""


def assemble(
    groups: Sequence[Group | None],
    weights: Mapping[str, float],
    *,
    std_norm: str,
    normalise_rewards: bool,
    min_group: int,
    trained_version: int,
    beside: Sequence[LeftOut] = (),
) -> RolloutBatch:
    """Turn ``groups`` (None for a sample that was quarantined) into a batch with advantages and metrics.

    ``beside`` is what else was drawn for them: groups that a refill took the place of, and samples without one.
    """
    kept = tuple(g for g in groups if g is not None and len(g.members) >= min_group)
    values = [{name: np.array([m.scores.values[name] for m in g.members]) for name in weights} for g in kept]
    totals = tuple(combine_rewards(v, weights, normalise=normalise_rewards) for v in values)
    advantages, zero_std = group_advantages(totals, std_norm=std_norm)
    metrics: dict[str, float] = {
        "rollout/groups": float(len(kept)),
        "rollout/dropped_groups": float(len(groups) - len(kept)),
        "rollout/failed_members": float(sum(len(g.failures) for g in groups if g is not None)),
    }
    if kept:
        metrics |= _reward_metrics(kept, values, totals, zero_std, trained_version)
    too_few = [LeftOut(g, TOO_FEW) for g in groups if g is not None and len(g.members) < min_group]
    return RolloutBatch(kept, totals, tuple(advantages), metrics, (*too_few, *beside))


def _reward_metrics(
    groups: Sequence[Group],
    values: Sequence[Mapping[str, np.ndarray]],
    totals: Sequence[np.ndarray],
    zero_std: int,
    version: int,
) -> dict[str, float]:
    members = [m for g in groups for m in g.members]
    pooled = {name: np.concatenate([v[name] for v in values]) for name in values[0]}
    total = np.concatenate(totals)
    metrics: dict[str, float] = {
        "reward/total_mean": float(total.mean()),
        "reward/total_std": float(total.std()),
        "advantage/zero_std_ratio": zero_std / len(groups),
        "rollout/unique_caption_ratio": float(
            np.mean([len({m.caption for m in g.members}) / len(g.members) for g in groups])
        ),
        "rollout/staleness_mean": float(np.mean([version - m.weights_version for m in members])),
    }
    for name, array in pooled.items():
        metrics[f"reward/{name}_mean"] = float(array.mean())
        metrics[f"reward/{name}_std"] = float(array.std())
    for name in sorted({n for m in members for n in m.scores.diagnostics}):
        seen = [m.scores.diagnostics[name] for m in members if name in m.scores.diagnostics]
        metrics[f"alarm/{name}"] = float(np.mean(seen))
    for (a, b), value in component_correlations(pooled).items():
        metrics[f"alarm/corr_{a}_{b}"] = value
    completions = [m.completion for m in members if m.completion is not None]
    if completions:
        metrics["rollout/completion_tokens_mean"] = float(np.mean([len(c.token_ids) for c in completions]))
        metrics["rollout/truncated_ratio"] = float(np.mean([c.finish_reason == "length" for c in completions]))
    return metrics
