"""When the signs of reward hacking go too far: thresholds, the judgement of one step, and alarms over a whole run.

A sign is a number (``rewards.signs``, the form of the completions, the groups); an alarm is a sign beyond its threshold.
Pure: state goes in and comes out, as plain values that a checkpoint can hold, so that a resumed run raises the same
alarms. Nothing here changes a reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Limits = tuple[float | None, float | None]
_Positive = Annotated[int, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
_Pair = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists only

CONSTANT = 1e-9
"""Largest standard deviation of a component that is the same for all answers but for rounding."""
CONSTANT_ALARM = "constant."

SMALL = 1e-3
"""Added to both sides of the ratio to the first steps: what was next to nothing then has no meaningful ratio."""


class AlarmSettings(BaseModel):
    """Where each sign is too far (None: never), and when that is an alarm. docs/rewards.md says what each is for.

    A run's YAML has these keys too: the configuration adds that it is strict.
    """

    model_config = ConfigDict(frozen=True)

    motion_below: float | None = Field(
        0.2, ge=0, description="Motion as a share of ground truth's, below which clips are frozen."
    )
    copy_above: float | None = Field(
        0.1,
        description="CLIP similarity to the last input frame beyond ground truth's own, above which clips are copies.",
    )
    sharpness_range: _Pair | None = Field((0.25, 4.0), description="Sharpness as a multiple of the run's first steps'.")
    saturation_beyond: float | None = Field(
        0.1, gt=0, description="Drift of the mean saturation (0…1) from the run's first steps."
    )
    correlation_below: float | None = Field(
        -0.5,
        ge=-1,
        le=1,
        description="Correlation of two rewards, below which one buys the other.",
    )
    format_below: _Fraction | None = Field(0.5, description="Share of completions in the asked form (stage 1).")
    length_range: _Pair | None = Field(
        (0.5, 1.5), description="Length of the completions as a multiple of the run's first steps' (stage 1)."
    )
    entropy_range: _Pair | None = Field(
        (0.1, 3.0), description="Token entropy as a multiple of the run's first steps' (stage 1)."
    )
    anchors_below: _Fraction | None = Field(0.2, description="Share of anchor captions that pass the filter (stage 2).")
    zero_std_above: _Fraction | None = Field(0.75, description="Share of groups whose rewards are all equal.")
    constant_after: _Positive | None = Field(
        10,
        description="Steps in a row in which a reward component is the same for all answers, from which on that is an alarm.",
    )
    first_steps: _Positive = Field(5, description="Steps of a stage from which drifts are measured.")
    patience: _Positive = Field(
        2, description="Steps in a row beyond a threshold that begin an alarm, or within it that end it."
    )
    stop_after: int = Field(
        0, ge=0, description="Stop the run after the same alarm N steps in a row; 0 never stops it."
    )

    @model_validator(mode="after")
    def _ranges(self) -> AlarmSettings:
        for name in ("sharpness_range", "length_range", "entropy_range"):
            limits = getattr(self, name)
            if limits is not None and not 0 <= limits[0] < 1 < limits[1]:
                raise ValueError(
                    f"{name}={list(limits)}: it is a multiple of the first steps' value, so it must hold 1, e.g. [0.5, 2.0]"
                )
        return self


@dataclass(frozen=True)
class _Rule:
    """One alarm: its sign, its limits, its sentence. A drift is judged against the run's own first steps."""

    alarm: str
    sign: str
    limits: Callable[[AlarmSettings], Limits]
    words: str
    drift: Literal["ratio", "difference"] | None = None


_RULES = (
    _Rule(
        "motion",
        "motion_ratio",
        lambda s: (s.motion_below, None),
        "clips move {value:.2f} times as much as ground truth",
    ),
    _Rule(
        "copy",
        "copy_excess",
        lambda s: (None, s.copy_above),
        "clips are {value:.2f} closer to the last input frame than ground truth is",
    ),
    _Rule(
        "sharpness",
        "sharpness_ratio",
        lambda s: s.sharpness_range or (None, None),
        "clips are {value:.2f} times as sharp as {base}",
        "ratio",
    ),
    _Rule(
        "saturation",
        "saturation_shift",
        lambda s: (None, None) if s.saturation_beyond is None else (-s.saturation_beyond, s.saturation_beyond),
        "colours are {value:+.2f} in saturation against {base}",
        "difference",
    ),
    _Rule(
        "format",
        "format_rate",
        lambda s: (s.format_below, None),
        "{value:.0%} of the completions have the form that was asked for",
    ),
    _Rule(
        "length",
        "completion_tokens",
        lambda s: s.length_range or (None, None),
        "completions are {value:.2f} times as long as in {base}",
        "ratio",
    ),
    _Rule(
        "entropy",
        "entropy",
        lambda s: s.entropy_range or (None, None),
        "the entropy of the tokens is {value:.2f} times that of {base}",
        "ratio",
    ),
    _Rule(
        "anchors",
        "anchors_kept_ratio",
        lambda s: (s.anchors_below, None),
        "{value:.0%} of the anchor captions pass the filter",
    ),
    _Rule(
        "zero_std",
        "zero_std_ratio",
        lambda s: (None, s.zero_std_above),
        "in {value:.0%} of the groups all rewards are equal, so nothing is learnt from them",
    ),
)

SIGNS = tuple(rule.sign for rule in _RULES)
"""Names of the signs that are judged, beside the correlations of reward components."""

GROUND_TRUTH = {"sharpness_ratio": 1.0, "saturation_shift": 0.0}
"""What ground truth itself has: where drifts are judged from when there are no first steps."""


def judge(
    signs: Mapping[str, float],
    settings: AlarmSettings,
    correlations: Mapping[tuple[str, str], float] | None = None,
    first: Mapping[str, float] | None = None,
    spreads: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Return alarm → what is wrong, in words, for one step's (or one system's) mean signs; what is missing is not judged.

    ``correlations``: pair of reward components → Pearson's r. ``first``: the drifting signs in the run's first steps;
    without it sharpness and saturation are judged against ground truth, and length and entropy not at all. ``spreads``: reward
    component → its standard deviation over the step's answers.
    """
    base, origin = ("ground truth", GROUND_TRUTH) if first is None else ("the run's first steps", first)
    found: dict[str, str] = {}
    for rule in _RULES:
        low, high = rule.limits(settings)
        if rule.sign not in signs or (rule.drift and rule.sign not in origin):
            continue
        value = signs[rule.sign]
        if rule.drift == "ratio":
            value = (value + SMALL) / (origin[rule.sign] + SMALL)
        elif rule.drift == "difference":
            value -= origin[rule.sign]
        if (low is not None and value < low) or (high is not None and value > high):
            found[rule.alarm] = f"{rule.alarm}: {rule.words.format(value=value, base=base)} (alarm {_span(low, high)})"
    threshold = settings.correlation_below
    for (a, b), r in (correlations or {}).items():
        if threshold is not None and r < threshold:
            found[f"correlation.{a}.{b}"] = f"correlation: {a} and {b} correlate by {r:.2f} (alarm below {threshold:g})"
    for name, spread in (spreads or {}).items():
        if settings.constant_after is not None and spread <= CONSTANT:
            found[f"{CONSTANT_ALARM}{name}"] = (
                f"constant: {name} has been the same for all answers of {settings.constant_after} steps, so nothing is learnt from it"
            )
    return found


@dataclass(frozen=True)
class Streak:
    """How long one sign has been beyond its threshold, and since which step that is an alarm (None: it is not)."""

    over: int = 0  # steps in a row beyond the threshold
    quiet: int = 0  # steps in a row within it while the alarm is on
    since: int | None = None


@dataclass(frozen=True)
class AlarmState:
    """All that alarms remember of a stage: the drifting signs of its first steps, and the streaks."""

    first: dict[str, tuple[float, ...]] = field(default_factory=dict)
    streaks: dict[str, Streak] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain values for the checkpoint."""
        return {
            "first": {name: list(values) for name, values in self.first.items()},
            "streaks": {name: asdict(streak) for name, streak in self.streaks.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AlarmState:
        """Return the state that :meth:`to_json` wrote."""
        return cls(
            {name: tuple(numbers) for name, numbers in values["first"].items()},
            {name: Streak(**streak) for name, streak in values["streaks"].items()},
        )

    @property
    def on(self) -> dict[str, int]:
        """The alarms that are on, and since which step."""
        return {name: streak.since for name, streak in self.streaks.items() if streak.since is not None}


@dataclass(frozen=True)
class Watched:
    """What one step brought: the new state, the alarms that began (with their sentence) and ended (with their first step)."""

    state: AlarmState
    began: dict[str, str]
    ended: dict[str, int]
    lasting: dict[str, str]
    """Alarms, with this step's sentence, that have stood for ``stop_after`` steps in a row."""


def watch(
    state: AlarmState,
    step: int,
    signs: Mapping[str, float],
    settings: AlarmSettings,
    correlations: Mapping[tuple[str, str], float] | None = None,
    spreads: Mapping[str, float] | None = None,
) -> Watched:
    """Judge one ``step`` of a run.

    A sign beyond its threshold for ``patience`` steps in a row begins an alarm, as many steps within it end it; a component without
    a spread begins one after ``constant_after`` steps. Drifts
    are judged from the step after the sign's first ``first_steps`` values on, against their mean. A sign that is
    missing or not finite counts as within its threshold.
    """
    signs = {name: value for name, value in signs.items() if math.isfinite(value)}
    drifting = [rule.sign for rule in _RULES if rule.drift and rule.sign in signs]
    known = {n: math.fsum(v) / len(v) for n, v in state.first.items() if len(v) >= settings.first_steps}
    found = judge(signs, settings, correlations, known, spreads)
    first = state.first | {n: (*state.first.get(n, ()), signs[n]) for n in drifting if n not in known}
    began: dict[str, str] = {}
    ended: dict[str, int] = {}
    streaks: dict[str, Streak] = {}
    for name in sorted({*found, *state.streaks}):
        old = state.streaks.get(name, Streak())
        if name in found:
            new = replace(old, over=old.over + 1, quiet=0)
            if new.since is None and new.over >= _patience(name, settings):
                new, began[name] = replace(new, since=step), found[name]
        else:
            new = replace(old, over=0, quiet=old.quiet + 1)
            if new.since is not None and new.quiet >= settings.patience:
                ended[name] = new.since
            if new.since is None or name in ended:
                continue
        streaks[name] = new
    limit = settings.stop_after
    lasting = {
        name: found[name]
        for name, streak in streaks.items()
        if limit and streak.over >= limit and streak.over >= _least(name, settings)
    }
    return Watched(AlarmState(first, streaks), began, ended, lasting)


def _patience(name: str, settings: AlarmSettings) -> int:
    """Return how many steps in a row begin the alarm ``name``."""
    return max(settings.patience, _least(name, settings))


def _least(name: str, settings: AlarmSettings) -> int:
    """Return how many steps in a row the sentence of the alarm ``name`` speaks of."""
    return (settings.constant_after or 1) if name.startswith(CONSTANT_ALARM) else 1


def _span(low: float | None, high: float | None) -> str:
    if low is None:
        return f"above {high:g}"
    if high is None:
        return f"below {low:g}"
    return f"beyond ±{high:g}" if low == -high else f"outside {low:g}–{high:g}"
