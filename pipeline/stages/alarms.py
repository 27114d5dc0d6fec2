"""Alarms over a stage: from the metrics of a step to signs, and from what changed to lines and tags.

When a sign is an alarm is decided in ``rewards.alarms``; here is only which metric it is, and how it is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

from rewards.alarms import AlarmSettings, AlarmState, Watched, watch

METRICS_OF = {
    "motion_ratio": ("alarm/motion_ratio",),
    "copy_excess": ("alarm/copy_excess",),
    "sharpness_ratio": ("alarm/sharpness_ratio",),
    "saturation_shift": ("alarm/saturation_shift",),
    "format_rate": ("rollout/format_rate",),
    "completion_tokens": ("rollout/completion_tokens_mean",),
    "entropy": ("learner/entropy", "learner/vlm/entropy"),  # of one learner, or of one of two (all_in_one)
    "anchors_kept_ratio": ("anchor/kept_ratio",),
    "zero_std_ratio": ("advantage/zero_std_ratio",),
}
"""Sign → the metrics that may hold it; a step has one of them, or none."""


@dataclass
class AlarmWatch:
    """Watches one stage, whose rewards have these ``components``; ``state`` goes into the checkpoint."""

    settings: AlarmSettings
    components: tuple[str, ...]
    state: AlarmState = field(default_factory=AlarmState)

    def see(self, step: int, metrics: Mapping[str, float]) -> Watched:
        """Judge ``step`` by its metrics and remember it."""
        signs = {sign: metrics[name] for sign, names in METRICS_OF.items() for name in names if name in metrics}
        pairs = {(a, b): f"alarm/corr_{a}_{b}" for a, b in combinations(self.components, 2)}
        correlations = {pair: metrics[name] for pair, name in pairs.items() if name in metrics}
        spreads = {name: metrics[key] for name in self.components if (key := f"reward/{name}_std") in metrics}
        spreads.pop(
            "format", None
        )  # answers that all have the form are what it is for; the alarm `format` sees the other end
        watched = watch(self.state, step, signs, self.settings, correlations, spreads)
        self.state = watched.state
        return watched


def alarm_lines(step: int, watched: Watched) -> list[tuple[str, str]]:
    """Return (line, style) for each alarm that began or ended with ``step``."""
    began = [(f"step {step} · alarm {text}", "bold yellow") for text in watched.began.values()]
    return began + [(f"step {step} · alarm {n} is over, on since step {s}", "green") for n, s in watched.ended.items()]


def alarm_tags(step: int, watched: Watched) -> dict[str, str]:
    """Return the tags ``alarm.<name>`` that say since when, or from when to when, each alarm was on."""
    began = {f"alarm.{name}": f"on since step {step}: {text}" for name, text in watched.began.items()}
    return began | {f"alarm.{name}": f"over at step {step}, on since {since}" for name, since in watched.ended.items()}
