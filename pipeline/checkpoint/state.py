"""What a run must remember besides the weights: a small record, stored as JSON beside them.

Weights, optimizer and scheduler are the learner group's own files in the same folder (``LearnerGroup.save``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError
from pipeline.config import RunConfig, config_digest, flatten

STATE_FILE = "train_state.json"

# What may differ between a run and its continuation: the sections that config_digest leaves out, sizes and deadlines of the
# machinery, and limits by which a person lets a run go on that met them (they decide which rows are usable from there on).
MAY_DIFFER = (
    *("name", "out", "cluster", "tracking", "control", "checkpoint", "pools", "evaluate", "alarms", "sft"),
    *("learner.start_timeout_s", "learner.step_timeout_s", "learner.max_restarts"),
    *("data.max_source_s", "data.max_source_mib", "data.max_decode_s", "data.max_quarantine_ratio"),
    *("stage1.rollout.max_failed_ratio", "stage2.rollout.max_failed_ratio"),
)


_WORDS: dict[type, str] = {str: "text", int: "a whole number", dict: "an object"}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("stage", "config_digest"), str),
    "step": int,
    **dict.fromkeys(("cursor", "window", "seeds", "rng", "mlflow_run_ids", "config", "extra", "inputs"), dict),
}


@dataclass
class TrainState:
    """Where a run stands: the next step of ``stage`` is ``step``, and it starts with the row at ``cursor``."""

    stage: str
    step: int
    cursor: dict[str, int] = field(default_factory=lambda: {"epoch": 0, "position": 0})
    window: dict[str, Any] = field(default_factory=dict)  # state of the SDE window's schedule
    seeds: dict[str, int] = field(default_factory=dict)
    rng: dict[str, Any] = field(default_factory=dict)  # states of the driver's generators, as JSON
    mlflow_run_ids: dict[str, str] = field(default_factory=dict)  # "parent", and one per stage
    config_digest: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # dotted keys, to name what differs
    extra: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)  # data and models, as ``inputs.Inputs`` stores them

    @classmethod
    def of(cls, config: RunConfig, stage: str, step: int, **rest: Any) -> TrainState:
        """Return the state of ``config`` at ``stage`` and ``step``; ``rest`` are further fields."""
        return cls(stage, step, config_digest=config_digest(config), config=flatten(config), **rest)

    def save(self, folder: Path) -> Path:
        """Write the state into ``folder``; raises TypeError for a value that JSON cannot hold."""
        path = folder / STATE_FILE
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: Path) -> TrainState:
        """Read the state from a checkpoint ``folder``; raises CheckpointError where it is missing or not one."""
        path = folder / STATE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no {STATE_FILE}, so this is not a checkpoint of a training run") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})") from error
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or not {"stage", "step"} <= set(values) <= names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(f"{path}: expected the keys {sorted(names)}, found {found}")
        for name, kind in _TYPES.items():
            if name in values and type(values[name]) is not kind:
                raise CheckpointError(f"{path}: {name} must be {_WORDS[kind]}, not {type(values[name]).__name__}")
        if values["step"] < 0 or any(type(v) is not int or v < 0 for v in values.get("cursor", {}).values()):
            raise CheckpointError(f"{path}: step and cursor must be whole numbers from 0")
        return cls(**values)


def may_differ(state: TrainState, *, restart_data: bool = False) -> tuple[str, ...]:
    """Return the keys that need not be those of ``state``: where the data lie, if their rows are compared, or begin anew."""
    return (*MAY_DIFFER, "data.train") if restart_data or state.inputs.get("data") else MAY_DIFFER


def require_same_config(state: TrainState, config: RunConfig, may_differ: Sequence[str] = MAY_DIFFER) -> None:
    """Check that ``config`` continues the run that wrote ``state``.

    ``may_differ`` are dotted keys or sections that are not compared. Raises ConfigError naming every other key
    whose value differs, with both values.
    """
    if state.config_digest == config_digest(config):
        return
    differing = _differences(state.config, flatten(config), may_differ)
    if differing:
        raise ConfigError(
            f"the checkpoint at step {state.step} of {state.stage} was written by another configuration:\n  "
            + "\n  ".join(differing)
            + "\nResume with the values of the checkpoint, or start a new run in another folder (out=…)."
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Sequence[str]) -> list[str]:
    lines = []
    for key in sorted({*old, *new}):
        if any(key == name or key.startswith(f"{name}.") for name in may_differ):
            continue
        before = json.dumps(old[key]) if key in old else "not set"
        now = json.dumps(new[key]) if key in new else "not set"
        if before != now:
            lines.append(f"{key}: {before} in the checkpoint, {now} now")
    return lines
