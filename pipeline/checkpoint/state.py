"""What a run must remember besides the weights: a small record, stored as JSON beside them.

Weights, optimizer and scheduler are the learner group's own files in the same folder (``LearnerGroup.save``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError
from pipeline.config import RunConfig, differences, flatten

STATE_FILE = "train_state.json"
FORMAT = 3
"""Of the record and of the files beside it. An older one is read, a newer one refused (docs/upgrading.md)."""

_WORDS: dict[type, str] = {str: "text", int: "a whole number", dict: "an object"}
_TYPES: dict[str, type] = {
    "stage": str,
    **dict.fromkeys(("step", "format"), int),
    **dict.fromkeys(("cursor", "mlflow_run_ids", "config", "extra", "inputs"), dict),
}


@dataclass
class TrainState:
    """Where a run stands: the next step of ``stage`` is ``step``, and it starts with the row at ``cursor``."""

    stage: str
    step: int
    cursor: dict[str, int] = field(default_factory=lambda: {"epoch": 0, "position": 0})
    mlflow_run_ids: dict[str, str] = field(default_factory=dict)  # "parent", and one per stage
    config: dict[str, Any] = field(default_factory=dict)  # dotted keys, to name what differs
    extra: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)  # data and models, as ``inputs.Inputs`` stores them
    format: int = FORMAT

    @classmethod
    def of(cls, config: RunConfig, stage: str, step: int, **rest: Any) -> TrainState:
        """Return the state of ``config`` at ``stage`` and ``step``; ``rest`` are further fields."""
        return cls(stage, step, config=flatten(config), **rest)

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
        if not isinstance(values, dict) or not {"stage", "step"} <= set(values):
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(f"{path}: expected the keys {sorted(names)}, found {found}")
        form = values.setdefault("format", 1)
        if type(form) is int and form > FORMAT:
            raise CheckpointError(
                f"{path}: written in format {form}, and this version reads up to {FORMAT}; use a newer vans"
            )
        if type(form) is int and form < FORMAT:  # it may hold fields that went
            values = {name: value for name, value in values.items() if name in names}
        elif unknown := sorted(set(values) - names):
            raise CheckpointError(f"{path}: expected the keys {sorted(names)}, found {unknown} too")
        for name, kind in _TYPES.items():
            if name in values and type(values[name]) is not kind:
                raise CheckpointError(f"{path}: {name} must be {_WORDS[kind]}, not {type(values[name]).__name__}")
        if values["step"] < 0 or any(type(v) is not int or v < 0 for v in values.get("cursor", {}).values()):
            raise CheckpointError(f"{path}: step and cursor must be whole numbers from 0")
        return cls(**values)


def free_besides(state: TrainState, *, restart_data: bool = False) -> tuple[str, ...]:
    """Return further keys that need not be those of ``state``: where the data lie, if their rows are compared, or begin anew."""
    return ("data.train",) if restart_data or state.inputs.get("data") else ()


def require_same_config(state: TrainState, config: RunConfig, besides: Sequence[str] = ()) -> None:
    """Check that ``config`` continues the run that wrote ``state``.

    Raises ConfigError naming every key whose value differs, with both values, unless it changes nothing that is learnt or is
    one of ``besides``.
    """
    if differing := differences(state.config, config, besides):
        raise ConfigError(
            f"the checkpoint at step {state.step} of {state.stage} was written by another configuration:\n  "
            + "\n  ".join(differing)
            + "\nResume with the values of the checkpoint, or start a new run in another folder (out=…)."
        )
