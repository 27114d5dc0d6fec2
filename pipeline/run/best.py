"""Which checkpoint of a run is the best so far, and the folder that it is exported to. Asks nothing: ``held_out`` does.

The best of the run decides what is exported, the best of the stage when to stop: stage 2 begins with the pair that stage 1 left,
and may have to learn for a while before it beats stage 1's luckiest evaluation.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.harmless import parse_json
from pipeline.checkpoint import TrainState

BEST = "best"
BEST_FILE = "best.json"


@dataclass(frozen=True)
class Mark:
    """The metric's ``value`` when ``step`` steps of ``stage`` were done."""

    stage: str
    step: int
    value: float


@dataclass(frozen=True)
class Standing:
    """What the evaluations of a run have found so far; a checkpoint holds it, so that a resumed run goes on with it.

    ``measured`` is a digest of what is asked and how: values of two digests cannot be compared. ``asked`` is the number of
    steps of the stage that were done at the last evaluation, −1 where there was none.
    """

    measured: str = ""
    best: Mark | None = None
    stage_best: Mark | None = None
    since: int = 0
    asked: int = -1

    def after(self, stage: str, step: int, value: float | None, higher: bool) -> Standing:
        """Return the standing after an evaluation that gave ``value``; None, or a value that is not finite, is no best."""
        if value is None or not math.isfinite(value):
            return replace(self, since=self.since + 1, asked=step)
        mark = Mark(stage, step, value)
        stage_best = _better(mark, self.stage_best, higher)
        return replace(
            self,
            best=_better(mark, self.best, higher),
            stage_best=stage_best,
            since=0 if stage_best is mark else self.since + 1,
            asked=step,
        )

    def next_stage(self) -> Standing:
        """Return the standing at the beginning of the stage that follows: the run's best stays, the stage's begins anew."""
        return replace(self, stage_best=None, since=0, asked=-1)

    def enough(self, patience: int) -> bool:
        """Return whether the stage has had ``patience`` evaluations in a row without a new best; 0 is never enough."""
        return 0 < patience <= self.since

    def to_json(self) -> dict[str, Any]:
        """Return the standing as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Standing:
        """Return what :meth:`to_json` wrote; raises CheckpointError for anything else."""
        try:
            marks = {key: _mark(values[key]) for key in ("best", "stage_best")}
            found = cls(measured=values["measured"], since=values["since"], asked=values["asked"], **marks)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's record of held-out evaluations cannot be read: {error}") from error
        if not isinstance(found.measured, str) or type(found.since) is not int or type(found.asked) is not int:
            raise CheckpointError("the checkpoint's record of held-out evaluations holds values of a wrong type")
        return found


def standing_of(state: TrainState | None) -> Standing:
    """Return the standing that a checkpoint's ``state`` holds; that of a new run where it has none."""
    values = state.extra.get("held_out") if state else None
    return Standing() if values is None else Standing.from_json(values)


def _mark(values: Mapping[str, Any] | None) -> Mark | None:
    if values is None:
        return None
    mark = Mark(**values)
    if not isinstance(mark.stage, str) or type(mark.step) is not int or not isinstance(mark.value, int | float):
        raise TypeError("a best has a stage, a whole step and a value")
    return mark


def _better(new: Mark, old: Mark | None, higher: bool) -> Mark:
    """Return the better of the two; of equal ones the earlier."""
    if old is None:
        return new
    return new if (new.value > old.value if higher else new.value < old.value) else old


def exported(out: Path) -> dict[str, Any]:
    """Return what ``out``/best/best.json says; nothing where there is no export of a best, or an unreadable one."""
    try:
        found = parse_json((out / BEST / BEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def export_best(out: Path, folders: Mapping[str, Path], about: Mapping[str, Any]) -> Path:
    """Copy the exports ``folders`` (name → folder) to ``out``/best, with best.json, in place of an earlier best; returns it.

    The folder appears when it is whole.
    """
    final, writing, old = out / BEST, out / f".{BEST}.writing", out / f".{BEST}.replaced"
    for left in (writing, old):
        shutil.rmtree(left, ignore_errors=True)
    writing.mkdir(parents=True)
    for name, folder in folders.items():
        shutil.copytree(folder, writing / name)
    (writing / BEST_FILE).write_text(json.dumps(dict(about), indent=2) + "\n", encoding="utf-8")
    if final.exists():
        final.rename(old)
    writing.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final
