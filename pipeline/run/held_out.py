"""Held-out evaluation while a run trains: a fixed subset of data.val is asked of the current pair, in the pools that serve anyway.

Answers, seeds and figures are those of ``vans evaluate``. Which of them is the best, and its export, is ``best``'s; when a
checkpoint is written is ``after_step``'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.records import Sample
from pipeline.checkpoint import CheckpointStore, Uploads
from pipeline.config import RunConfig
from pipeline.data.source import SampleSource
from pipeline.data.sources import validation_source
from pipeline.evaluate.evaluation import PAIR, score_systems
from pipeline.evaluate.predict import answer_samples
from pipeline.evaluate.table import require_metric
from pipeline.run.best import Mark, Standing, export_best, exported
from pipeline.run.learners import averages_served, export_name
from pipeline.stages.loop import Learners
from pipeline.stages.table import STAGES, AnyStage
from pipeline.tracking import Tracker


@dataclass
class HeldOut:
    """The evaluations of one run. Without a ``source`` (``evaluate.every`` is 0) nothing is asked, and an earlier best is kept."""

    config: RunConfig
    tracker: Tracker
    store: CheckpointStore
    uploads: Uploads
    source: SampleSource | None = None
    require_owned: Callable[[], None] = lambda: None
    standing: Standing = field(default_factory=Standing)
    samples: Sequence[Sample] = ()
    written: Mark | None = None  # the best whose checkpoint is there

    def __post_init__(self) -> None:
        self.higher = require_metric(self.config.evaluate.metric, self.config.evaluate.rewards)
        self.measured = _measured(self.config, self.source) if self.source is not None else ""

    async def load(self) -> None:
        """Decode the subset; raises DataError where too much of it is broken. Ray must be running."""
        if self.source is not None:
            self.samples = (await asyncio.to_thread(self.source.load_all)).samples

    def take_up(self, standing: Standing) -> str | None:
        """Go on with ``standing``; returns a line for people where it begins anew, because something else is measured now."""
        told = None
        if self.source is not None and standing.measured != self.measured:
            if standing.measured:
                told = (
                    "evaluate.metric, what it asks or how has changed since the checkpoint: the best is looked for anew"
                )
            standing = Standing(self.measured)
        self.standing, self.written = standing, standing.best
        self._spare()
        return told

    def due(self, step: int) -> bool:
        """Return whether the stage is to be evaluated now that ``step`` steps are done, and has not been."""
        return self.source is not None and step % self.config.evaluate.every == 0 and self.standing.asked != step

    @property
    def over(self) -> bool:
        """Whether the stage ends here, for want of a new best."""
        return self.source is not None and self.standing.enough(self.config.evaluate.stop_if_not_better)

    def is_best(self, stage: str, step: int) -> bool:
        """Return whether the run's best is this very step, and its checkpoint is yet to be written."""
        best = self.standing.best
        return best is not None and (best.stage, best.step) == (stage, step) and best != self.written

    async def ask(self, stage: AnyStage, learners: Learners, step: int, say: Callable[[str], None]) -> None:
        """Ask the subset if it is due, log the figures at ``step`` and update the standing; raises what a rollout would.

        What an export holds is asked: with ``optim.ema`` the average. Nothing has moved before the first step.
        """
        if not self.due(step):
            return
        started, metric = time.monotonic(), self.config.evaluate.metric
        async with averages_served(stage, learners) if step else nullcontext():
            predictions = await answer_samples(self.config, stage.fleet, self.samples)
        table = await score_systems(self.config, stage.fleet, {PAIR: predictions}, self.samples)
        figures = {name: value for name, value in table.figures(PAIR).items() if name != "n"}
        value = figures.get(metric)
        self.standing = self.standing.after(stage.name, step, value, self.higher)
        best = self.standing.stage_best
        logged = {f"evaluate/{name}": found for name, found in figures.items()}
        logged |= {"evaluate/best": best.value} if best else {}
        self.tracker.log_metrics(logged | {"evaluate/since_best": float(self.standing.since)}, step)
        what = "cannot be computed for any answer" if value is None else f"{value:.4f}"
        how = "the best so far" if not self.standing.since else f"{self.standing.since} since the best"
        seconds = time.monotonic() - started
        say(f"held out after {step} steps of {stage.name}: {metric} {what} · {how} · {seconds:.1f} s")

    def settle(self, saved: bool) -> None:
        """Keep and export the new best whose checkpoint is ``saved``; one without a checkpoint is none."""
        if not saved:
            self.standing = replace(self.standing, best=self.written)
            return
        self.written = self.standing.best
        self._spare()
        self.export()

    def export(self) -> None:
        """Have ``best`` hold the best pair: what its checkpoint exported, and what stages before it did. Nothing if it does."""
        best, out = self.standing.best, self.config.out
        if best is None or self.source is None:
            return
        about = {"stage": best.stage, "step": best.step, "metric": self.config.evaluate.metric, "value": best.value}
        about |= {"samples": len(self.samples), "data": str(self.config.data.val), "measured": self.standing.measured}
        checkpoint = self._checkpoint(best)
        if not checkpoint.is_dir() or _same(about, exported(out)):
            return
        folders: dict[str, Path] = {}
        for kind in STAGES[self.config.training]:
            here = kind.name == best.stage
            for name in (export_name(self.config, policy) for policy in kind.policies):
                if (folder := (checkpoint if here else out) / name).is_dir():
                    folders[name] = folder
            if here:
                break
        self.require_owned()
        self.uploads.offer_export(export_best(out, folders, about))

    def remembered(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this: nothing for a run that has never evaluated."""
        return {} if self.standing == Standing() else {"held_out": self.standing.to_json()}

    def _checkpoint(self, mark: Mark) -> Path:
        return self.store.root / f"{mark.stage}-step{mark.step:06d}"

    def _spare(self) -> None:
        """Have store and mirror keep the best checkpoint that is written."""
        self.store.best = self._checkpoint(self.written) if self.written else None
        if self.uploads.mirror is not None:
            self.uploads.mirror.best = self.store.best.name if self.store.best else ""


def held_out_source(config: RunConfig, tracker: Tracker) -> SampleSource | None:
    """Return the subset that ``evaluate.every`` asks, None where it is off; it is noted in MLflow.

    Raises DataError or StorageError where data.val cannot be read.
    """
    if not config.evaluate.every:
        return None
    source = validation_source(config)
    tracker.log_dataset(str(config.data.val), source.digest, source.count, context="validation")
    return source


def _measured(config: RunConfig, source: SampleSource) -> str:
    """Return a digest of everything that an evaluation's figures depend on, but for the weights."""
    section = config.evaluate.model_dump(mode="json", exclude={"samples", "every", "stop_if_not_better"})
    content = [section, config.video.model_dump(mode="json"), config.seed, source.digest]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _same(about: dict[str, Any], found: dict[str, Any]) -> bool:
    return all(found.get(key) == about[key] for key in ("stage", "step", "metric", "value", "measured"))
