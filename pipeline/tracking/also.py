"""Other places that a run's figures go to beside MLflow: TensorBoard files, Weights & Biases (``tracking.also``).

MLflow stays the record: a sink is handed what MLflow has taken, in that order, and each step once, also where a resumed run repeats it.
A sink that fails never ends a run and never holds back MLflow: the failure is logged once. Called in the tracking thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from cluster.errors import VansError
from cluster.harmless import redacted
from pipeline.config.machinery import SinkName
from pipeline.tracking.outbox import Record

PARENT = "parent"
"""The job itself, beside its stages."""

log = logging.getLogger(__name__)


class TrackingError(VansError):
    """Tracking cannot be used as configured, or a metric was logged that nobody declared."""


@dataclass(frozen=True)
class Job:
    """What a sink is opened with."""

    name: str
    experiment: str  # that it is part of
    id: str  # MLflow's
    folder: Path  # of its tracking files


class Sink(Protocol):
    """One place. ``run`` is a stage's name, or ``PARENT``."""

    def params(self, values: Mapping[str, str]) -> None:
        """Keep the job's settings."""

    def metrics(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Keep the figures of a step. A step may come in several calls, with other figures in each."""

    def image(self, run: str, key: str, path: Path, step: int) -> None:
        """Keep a picture: a PNG file, which is removed after the call."""

    def close(self, failed: bool) -> None:
        """Write everything out: the job has ended."""


class TensorBoard:
    """Event files under ``<tracking folder>/tensorboard/<stage>``; ``tensorboard --logdir`` shows them."""

    def __init__(self, job: Job) -> None:
        self._folder = job.folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def _writer(self, run: str) -> Any:
        from tensorboardX import SummaryWriter

        if run not in self._writers:
            # Without a suffix, two writers of one second would have one file.
            self._writers[run] = SummaryWriter(str(self._folder / run), filename_suffix=f".{uuid4().hex[:8]}")
        return self._writers[run]

    def params(self, values: Mapping[str, str]) -> None:
        """Write the settings as a text."""
        lines = "\n".join(f"    {name}: {value}" for name, value in values.items())
        self._writer(PARENT).add_text("settings", lines)
        self._writer(PARENT).flush()

    def metrics(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Write each figure as a scalar."""
        writer = self._writer(run)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def image(self, run: str, key: str, path: Path, step: int) -> None:
        """Write the picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer(run).add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer(run).flush()

    def close(self, failed: bool) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class WeightsAndBiases:
    """One run of W&B for the job, in the project that MLflow calls experiment; a stage's figures are ``<stage>/<name>``.

    W&B reads its own variables: WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline. A resumed job goes on in its run.
    """

    def __init__(self, job: Job) -> None:
        import wandb

        job.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", silent=True, disable_git=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=job.experiment, name=job.name, id=job.id, resume="allow", dir=str(job.folder), settings=settings
        )
        self._known: set[str] = set()

    def params(self, values: Mapping[str, str]) -> None:
        """Keep the settings as the run's configuration."""
        self._run.config.update(dict(values), allow_val_change=True)

    def metrics(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Log a step, whose number is a figure of its own: W&B's own counts calls."""
        self._run.log(self._named(run, step, values))

    def image(self, run: str, key: str, path: Path, step: int) -> None:
        """Log the picture."""
        self._run.log(self._named(run, step, {key: self._wandb.Image(str(path))}))

    def close(self, failed: bool) -> None:
        """Send the rest, and mark the run as finished or failed."""
        self._run.finish(exit_code=int(failed))

    def _named(self, run: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        if run not in self._known:
            self._known.add(run)
            self._run.define_metric(f"{run}/step", hidden=True)
            self._run.define_metric(f"{run}/*", step_metric=f"{run}/step")
        return {f"{run}/{name}": value for name, value in values.items()} | {f"{run}/step": step}


SINKS: Mapping[SinkName, Callable[[Job], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the name in ``tracking.also``."""


class Copies:
    """Hands what MLflow took to every sink."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)
        self._told: set[tuple[str, str]] = set()
        self.failed = 0  # calls of a sink that raised

    @classmethod
    def open(cls, names: Iterable[SinkName], job: Job) -> Copies:
        """Open the sinks called ``names``; raises TrackingError where one cannot be, which names the cure."""
        sinks: dict[str, Sink] = {}
        for name in names:
            try:
                sinks[name] = SINKS[name](job)
            except ImportError as error:
                raise TrackingError(
                    f"tracking.also names {name}, whose package is not installed ({error.name}): pip install {error.name}, or leave "
                    "it out"
                ) from error
            except Exception as error:
                told = redacted((str(error).splitlines() or [type(error).__name__])[0][:300])
                raise TrackingError(
                    f"tracking.also names {name}, which cannot be opened: {told}. Log in to it, set WANDB_MODE=offline, or leave it out"
                ) from error
        return cls(sinks)

    def take(self, record: Record, metrics: Sequence[tuple[str, float, int]] = ()) -> None:
        """Hand over a record that MLflow has carried out; ``metrics`` are (name, value, step) of those that were new to it."""
        run, op = record["run"], record["op"]
        if op == "metrics":
            steps: dict[int, dict[str, float]] = {}
            for name, value, step in metrics:
                steps.setdefault(step, {})[name] = value
            for step, values in steps.items():
                self._each("metrics", run, step, values)
        elif op == "params" and run == PARENT:
            self._each("params", record["values"])
        elif op == "image":
            self._each("image", run, record["key"], Path(record["path"]), record["step"])
        elif op == "end" and run == PARENT:
            self._each("close", record["status"] != "FINISHED")

    def _each(self, method: str, *arguments: Any) -> None:
        for name, sink in self._sinks.items():
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # noqa: BLE001 - a copy that cannot be made must not end a run; it is told
                self.failed += 1
                told = redacted(f"{type(error).__name__}: {error}"[:300])
                if (name, told) not in self._told:
                    self._told.add((name, told))
                    log.error("%s (tracking.also) did not take a record, which MLflow has: %s", name, told)
