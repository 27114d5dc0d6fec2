"""What a run's folder, and its MLflow store, say about it: everything that the page shows, as plain values."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import ConfigError, DataError
from cluster.harmless import redacted
from pipeline.config import RunConfig, flatten, load_config
from pipeline.config.load import BUNDLED
from pipeline.control.trace import TRACE_FILE, read_trace
from pipeline.stages.alarms import AlarmWatch
from pipeline.support.location import local_path
from pipeline.tracking.history import JobRun, Series, newest_parent, read_job, read_stages
from pipeline.tracking.rollouts import StoredStep, read_note, stored_steps
from pipeline.tracking.tracker import has_store, location

log = logging.getLogger(__name__)

STAGES = ("stage1", "stage2", "all_in_one")


@dataclass(frozen=True)
class AlarmSpan:
    """An alarm that was on from step ``first`` to ``last``; ``words`` say why it began."""

    stage: str
    name: str
    first: int
    last: int
    words: str


@dataclass(frozen=True)
class Change:
    """A setting that differs from the base's."""

    key: str
    base: str
    here: str


@dataclass(frozen=True)
class Run:
    """What is known about a run. ``notes`` say what is missing, and why."""

    folder: Path
    config: RunConfig
    job: JobRun | None
    stages: dict[str, Series]
    alarms: tuple[AlarmSpan, ...]
    steps: tuple[StoredStep, ...]
    trace: tuple[dict[str, Any], ...]
    base: str
    changes: tuple[Change, ...]
    table: dict[str, Any] | None = None
    pictures: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())


def gather(folder: str | Path) -> Run:
    """Return what is known about the run in ``folder``; raises ConfigError where it is no run's folder.

    Where the MLflow store has nothing, or does not answer, the curves are those that the stored rollouts bring along.
    """
    root = local_path(folder)
    if not (root / "config.yaml").is_file():
        raise ConfigError(
            f"{folder}: not a run's folder, there is no config.yaml in it (a run's is its `out`, such as runs/toy)"
        )
    config = load_config(root / "config.yaml")
    steps = tuple(stored_steps(root))
    notes: list[str] = []
    job, stages, why = _tracked(root, config, steps)
    if why:
        notes.append(why)
    stages = stages or _from_notes(steps)
    stages = {name: stages[name] for name in sorted(stages, key=lambda n: (n not in STAGES, n))}
    if not steps:
        notes.append("No rollouts are stored: tracking.rollouts.every is 0, or no step has ended yet.")
    base, changes = nearest_base(config)
    return Run(
        root,
        config,
        job,
        stages,
        tuple(span for name, series in stages.items() for span in alarm_spans(config, name, series)),
        steps,
        tuple(read_trace(root / TRACE_FILE)) if (root / TRACE_FILE).is_file() else (),
        base,
        changes,
        _table(root / "table.json"),
        tuple(path for path in (root / "contact_sheet.png",) if path.is_file()),
        tuple(notes),
    )


def _tracked(
    root: Path, config: RunConfig, steps: tuple[StoredStep, ...]
) -> tuple[JobRun | None, dict[str, Series], str]:
    """Return the job, its curves by stage, and what is to be said where they are not there."""
    uri, _ = location(root, config.tracking)
    if not has_store(root, config.tracking):
        return None, {}, "There is no MLflow store here: curves are of the stored steps alone."
    try:
        parent = _named(steps) or newest_parent(uri, config.tracking.experiment, config.name)
        if parent is None:
            return None, {}, f"MLflow ({redacted(uri)}) has no run called {config.name} yet."
        return read_job(uri, parent), read_stages(uri, parent), ""
    except (MlflowException, SQLAlchemyError, OSError) as error:
        told = redacted((str(error).splitlines() or [type(error).__name__])[0][:200])
        return None, {}, f"MLflow ({redacted(uri)}) does not answer: {told}. Curves are of the stored steps alone."


def _named(steps: tuple[StoredStep, ...]) -> str:
    """Return MLflow's id of the job that stored the last of ``steps``, "" where none says it: others may have the same name."""
    for each in reversed(steps):
        try:
            return str(read_note(each.path).get("run", ""))
        except DataError:
            continue
    return ""


def _from_notes(steps: tuple[StoredStep, ...]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for each in steps:
        try:
            figures = read_note(each.path)["figures"]
        except (DataError, KeyError):  # the browser says so where the step is shown
            continue
        for name, value in figures.items():
            found.setdefault(each.stage, {}).setdefault(name, []).append((each.step, float(value)))
    return found


def alarm_spans(config: RunConfig, stage: str, series: Mapping[str, list[tuple[int, float]]]) -> list[AlarmSpan]:
    """Return from when to when each alarm of ``stage`` was on: the run's own judgement, repeated over its curves."""
    metrics: dict[int, dict[str, float]] = {}
    for name, points in series.items():
        for step, value in points:
            metrics.setdefault(step, {})[name] = value
    components = tuple(n.removeprefix("reward/").removesuffix("_mean") for n in series if _is_component(n))
    watch, last = AlarmWatch(config.alarms, components), 0
    open_: dict[str, tuple[int, str]] = {}
    spans: list[AlarmSpan] = []
    for step in sorted(step for step, values in metrics.items() if "reward/total_mean" in values):
        watched, last = watch.see(step, metrics[step]), step
        open_ |= {name: (step, words) for name, words in watched.began.items()}
        for name in watched.ended:
            if name in open_:
                first, words = open_.pop(name)
                spans.append(AlarmSpan(stage, name, first, step, words))
    spans += [AlarmSpan(stage, name, first, last, words) for name, (first, words) in open_.items()]
    return sorted(spans, key=lambda span: (span.first, span.name))


def _is_component(name: str) -> bool:
    return name.startswith("reward/") and name.endswith("_mean") and name != "reward/total_mean"


def nearest_base(config: RunConfig) -> tuple[str, tuple[Change, ...]]:
    """Return the bundled run that ``config`` differs least from, and in what: a resolved configuration names no base."""
    here = flatten(config)
    found: list[tuple[str, tuple[Change, ...]]] = []
    for path in sorted(BUNDLED.glob("*.yaml")):
        base = flatten(load_config(path))
        changes = tuple(
            Change(key, _shown(base, key), _shown(here, key))
            for key in sorted({*base, *here})
            if base.get(key) != here.get(key)
        )
        found.append((path.stem, changes))
    return min(found, key=lambda each: len(each[1]))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not set"


def _table(path: Path) -> dict[str, Any] | None:
    """Return the evaluation that lies beside the run, None where there is none or it is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("systems"), dict) else None
