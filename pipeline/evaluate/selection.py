"""Which rows of a dataset teach reinforcement learning something: what is known of each row, and which are kept. Pure.

A group whose rewards are all equal has no gradient (arXiv 2402.03300), and stage 2 takes no sample whose anchor caption says something
else than the truth (arXiv 2511.16669). Asking the pair about the rows is ``selecting``'s.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from pipeline.stages.groups import Group
from pipeline.stages.stage2 import Anchor
from rewards.combine import combine_rewards

KEPT, NOT_NEEDED = "kept", "smaller spread"
BROKEN, LOST, FLAT, ANCHOR = "broken", "lost", "no spread", "anchor"
REASONS = {
    KEPT: "in the selection",
    NOT_NEEDED: "teaches something, and enough others have a larger spread of rewards",
    FLAT: "the rewards of its group are all equal: no gradient",
    ANCHOR: "its anchor caption is missing, or further from the truth than stage2.anchor_min_rouge allows",
    LOST: "too few members of its group could be scored",
    BROKEN: "its clips cannot be decoded",
}
"""Why a row is kept or not, in the order of the table."""


@dataclass(frozen=True)
class Verdict:
    """What is known of a row after its group was sampled and scored."""

    row: int  # in stored order, from 0
    id: str
    why: str = KEPT  # a key of REASONS; of rows that teach something KEPT until they are compared
    told: str = ""
    scored: int = 0  # members of the group that have a score
    reward: float | None = None  # mean of the group's totals
    spread: float | None = None  # their standard deviation
    components: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # mean and standard deviation by name
    anchor: str | None = None  # the anchor's caption
    anchor_rouge_l: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Verdict:
        """Return the verdict that :meth:`to_json` gave."""
        parts = {name: (pair[0], pair[1]) for name, pair in values["components"].items()}
        return cls(**{**values, "components": parts})


def judge(
    row: int,
    group: Group,
    anchor: Anchor,
    weights: Mapping[str, float],
    *,
    normalise: bool,
    min_group: int,
    min_rouge: float,
) -> Verdict:
    """Return what ``group`` and ``anchor`` say of the sample in ``row``, by the settings of the stages that would learn from it."""
    values = {name: np.array([member.scores.values[name] for member in group.members]) for name in weights}
    parts = {name: (float(v.mean()), float(v.std())) for name, v in values.items()} if group.members else {}
    known: dict[str, Any] = {"scored": len(group.members), "components": parts}
    if anchor.caption is not None:
        known |= {"anchor": anchor.caption, "anchor_rouge_l": float(anchor.rouge_l)}
    if len(group.members) < min_group:
        told = Counter(group.failures).most_common(1)
        return Verdict(row, group.sample.id, LOST, told[0][0] if told else "", **known)
    totals = combine_rewards(values, weights, normalise=normalise)
    known |= {"reward": float(totals.mean()), "spread": float(totals.std())}
    if np.ptp(totals) == 0.0:
        return Verdict(row, group.sample.id, FLAT, **known)
    if refused := anchor.refused(min_rouge):
        return Verdict(row, group.sample.id, ANCHOR, refused, **known)
    return Verdict(row, group.sample.id, **known)


def choose(verdicts: Sequence[Verdict], count: int) -> list[Verdict]:
    """Return ``verdicts`` in their order, where of those that teach something all but ``count`` are NOT_NEEDED.

    The largest spread of rewards is kept; of equal ones the first.
    """
    able = sorted((v for v in verdicts if v.why == KEPT), key=lambda v: (-(v.spread or 0.0), v.row))
    rest = {v.row for v in able[count:]}
    return [Verdict(**{**_plain(v), "why": NOT_NEEDED}) if v.row in rest else v for v in verdicts]


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {each.name: getattr(verdict, each.name) for each in fields(verdict)}


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return how many rows there are of each reason, in the order of REASONS."""
    found = Counter(verdict.why for verdict in verdicts)
    return {why: found[why] for why in REASONS}


def as_csv(verdicts: Sequence[Verdict]) -> str:
    """Return one line a row: why it is kept or not, and the figures behind that."""
    names = sorted({name for verdict in verdicts for name in verdict.components})
    plain = [each.name for each in fields(Verdict) if each.name != "components"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*plain, *(f"{name}_{part}" for name in names for part in ("mean", "spread"))])
    for verdict in verdicts:
        parts = [verdict.components.get(name, ("", "")) for name in names]
        writer.writerow([*(getattr(verdict, name) for name in plain), *(value for pair in parts for value in pair)])
    return text.getvalue()
