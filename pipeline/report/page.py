"""``vans report``: writes a run's page, as a folder or as one file. It opens from the disk, and asks nothing of any network.

Everything that a person or a model has written goes through Jinja2's escaping, or into JSON that the script shows as text alone;
the page's own policy forbids every script but its one.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cluster.errors import DataError
from cluster.harmless import printable
from pipeline.report.browser import clip_name, step_view
from pipeline.report.curves import COLOURS, FIRST, chart, spark
from pipeline.report.gather import AlarmSpan, Run, gather
from pipeline.tracking.history import Series
from pipeline.tracking.metrics import find
from pipeline.tracking.rollouts import StoredStep, read_step

POOL_CHARTS = (
    ("Workers at work", "Over seconds since the pools were opened; one look every control.trace_every_s.", "busy"),
    ("Workers that serve", "A pool that grows or loses a worker shows here.", "ready"),
    ("Waiting requests", "The pool with the longest queue holds up the step.", "queue_len"),
)
"""Title, what to look for, and the figure of a line of pools.jsonl."""
INDEX, CLIPS = "index.html", "clips"
_LOADER = PackageLoader("pipeline.report")


@dataclass
class _Clips:
    """The page's clips: files beside it, or text within it; each once."""

    folder: Path | None
    inline: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    size: int = 0  # bytes of the clips

    def keep(self, video: bytes) -> str:
        name = clip_name(video)
        if name not in self.names:
            self.names.add(name)
            self.size += len(video)
            if self.folder is None:
                self.inline[name] = base64.b64encode(video).decode()
            elif not (path := self.folder / f"{name}.mp4").is_file():
                _write(path, video)
        return name


def write_page(run: str | Path, out: Path, *, single: bool = False, most_bytes: int | None = None) -> Path:
    """Write the page of the run in the folder ``run`` into ``out`` and return its file; a page that is there is replaced.

    ``single`` puts clips and pictures into the file itself. ``most_bytes`` bounds the clips: the newest steps are on the page
    as far as they fit. Raises ConfigError where ``run`` is no run's folder.
    """
    found = gather(run)
    out.mkdir(parents=True, exist_ok=True)
    folder = None if single else out / CLIPS
    if folder is not None:
        folder.mkdir(exist_ok=True)
    clips = _Clips(folder)
    steps, notes = _steps(found.steps, clips, most_bytes)
    pictures = [_picture(path, None if single else out) for path in found.pictures]
    path = out / INDEX
    _write(path, render(found, steps, clips.inline, pictures, (*found.notes, *notes), single=single).encode())
    if folder is not None:  # what an earlier page showed and this one does not
        for old in folder.glob("*.mp4"):
            if old.stem not in clips.names:
                old.unlink(missing_ok=True)
    return path


def _steps(
    stored: tuple[StoredStep, ...], clips: _Clips, most_bytes: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the views of the stored steps, in order, and what is to be said about those that are not among them."""
    views: dict[Path, dict[str, Any]] = {}
    notes: list[str] = []
    for each in sorted(stored, key=lambda step: _written(step.path), reverse=True):
        if most_bytes is not None and clips.size >= most_bytes:
            notes.append(f"The newest {len(views)} of {len(stored)} stored steps are here; `vans report` shows all.")
            break
        try:
            rows, note = read_step(each.path)
        except DataError as error:
            if each.path.is_file():  # else the run has removed it
                notes.append(str(error))
            continue
        views[each.path] = step_view(rows, note, each.stage, each.step, clips.keep)
    return [views[each.path] for each in stored if each.path in views], notes


def _written(path: Path) -> float:
    """Return when ``path`` was written, 0 where the run has removed it as too old meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def render(
    run: Run,
    steps: list[dict[str, Any]],
    inline: Mapping[str, str],
    pictures: list[str],
    notes: tuple[str, ...],
    *,
    single: bool,
) -> str:
    """Return the page as HTML. ``inline``: clips by name as base64; ``pictures``: addresses of images."""
    environment = Environment(loader=_LOADER, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["printable"] = printable
    style, script = (_LOADER.get_source(environment, name)[0] for name in ("style.css", "script.js"))
    there = {(step["stage"], step["step"]) for step in steps}
    return environment.get_template("page.html").render(
        run=run,
        notes=notes,
        facts=facts(run),
        pools=pool_panels(run.trace),
        stages=[stage_view(run, name, series, there) for name, series in run.stages.items()],
        steps=[{"id": f"{s['stage']}-{s['step']}", "data": s} for s in steps],
        numbers=_numbers(steps),
        clips=inline,
        single=single,
        pictures=pictures,
        table=table_view(run.table) if run.table else None,
        colours=COLOURS,
        style=Markup(style),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704
        policy=_policy(style, script),
    )


def _policy(style: str, script: str) -> str:
    """Return the page's content security policy: its own style and script, its own files, and nothing else."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "img-src 'self' file: data:; media-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )


def _numbers(steps: list[dict[str, Any]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for step in steps:
        found.setdefault(step["stage"], []).append(step["step"])
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """Return what the run was, as a few lines: name → value."""
    config, job = run.config, run.job
    found = [("folder", str(run.folder)), ("models", f"thinker {config.models.vlm}, artist {config.models.vdm}")]
    found += [("data", str(config.data.train)), ("seed", str(config.seed)), ("nearest bundled run", run.base)]
    if job is not None:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.start))
        lasted = f", {(job.end - job.start) / 60:.1f} min" if job.end else ""
        found += [("status", job.status.lower()), ("began", f"{began} UTC{lasted}"), ("MLflow run", job.id)]
        if commit := job.tags.get("mlflow.source.git.commit"):
            dirty = ", with uncommitted changes" if job.tags.get("vans.git.dirty") == "true" else ""
            found.append(("code", commit[:12] + dirty))
        told = ("vans.error", "vans.stopped", "vans.stopped_early", "vans.restart", "vans.data_restarts")
        found += [(name.removeprefix("vans."), job.tags[name]) for name in told if name in job.tags]
    return found


@dataclass(frozen=True)
class StageView:
    """One stage's part of the page."""

    name: str
    done: int
    planned: int
    reward: tuple[float, float] | None
    alarms: list[AlarmSpan]
    panels: list[dict[str, Any]]
    rest: list[dict[str, Any]]


def stage_view(run: Run, name: str, series: Series, there: set[tuple[str, int]]) -> StageView:
    """Return the charts of a stage: those to look at first, and all others."""
    alarms = [span for span in run.alarms if span.stage == name]
    marks = [(a.first, a.last, f"steps {a.first} to {a.last} · {a.words}") for a in alarms]
    shown: set[str] = set()
    panels = []
    for panel in FIRST:
        names = panel.chosen(list(series))
        if not names:
            continue
        shown |= set(names)

        def link(step: int) -> str | None:
            return f"#{name}-{step}" if (name, step) in there else None

        drawn = chart({metric: panel.points(series[metric]) for metric in names}, marks, link)
        panels.append({"title": panel.title, "about": panel.about, "svg": drawn, "names": names})
    rest = [
        {"name": metric, "last": points[-1][1], "svg": spark(points), **_meaning(metric)}
        for metric, points in series.items()
        if metric not in shown and points
    ]
    rewards = [value for _, value in series.get("reward/total_mean", ())]
    done = max((step for step, _ in series.get("time/step_s", series.get("reward/total_mean", ()))), default=-1) + 1
    section = run.config.stage2 if name == "stage2" else run.config.stage1
    edge = (_mean(rewards[:5]), _mean(rewards[-5:])) if rewards else None
    return StageView(name, done, section.steps, edge, alarms, panels, rest)


def pool_panels(trace: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return charts over a run's time of how many workers of each pool were at work, served, and what waited for them."""
    began = trace[0]["time"] if trace else 0.0
    names = list(dict.fromkeys(name for line in trace for name in line["pools"]))
    panels = []
    for title, about, key in POOL_CHARTS:
        curves = {
            name: [
                (round(line["time"] - began), float(line["pools"][name][key]))
                for line in trace
                if name in line["pools"]
            ]
            for name in names
        }
        if any(curves.values()):
            panels.append({"title": title, "about": about, "svg": chart(curves), "names": names})
    return panels


def _meaning(metric: str) -> dict[str, str]:
    declared = find(metric)
    return {"unit": declared.unit, "meaning": declared.meaning} if declared else {"unit": "", "meaning": ""}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table_view(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation's table as headings and rows: each system's metrics with their intervals."""
    from pipeline.evaluate.table import HEADINGS, heading

    systems = table["systems"]
    found = {name: (result.get("metrics") or {}).get("all") or {} for name, result in systems.items()}
    there = dict.fromkeys(m for values in found.values() for m in values)
    metrics = [*(m for m in HEADINGS if m in there), *(m for m in there if m not in HEADINGS)]
    rows = [(heading(m), [_estimate(values.get(m)) for values in found.values()]) for m in metrics]
    alarms = [f"{name}: {text}" for name, result in systems.items() for text in result.get("alarms", ())]
    return {"systems": list(found), "rows": rows, "alarms": alarms, "n": (table.get("samples") or {}).get("all")}


def _estimate(found: Mapping[str, Any] | None) -> str:
    if not found or found.get("value") is None:
        return "–"
    low, high = found.get("low"), found.get("high")
    return f"{found['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def _picture(path: Path, out: Path | None) -> str:
    if out is None:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    shutil.copyfile(path, out / path.name)
    return path.name


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
