"""The MLflow side of tracking: opens runs and carries out the records that the outbox delivers.

Called from one thread at a time. Which failures may pass (and are tried again) and which may not is decided here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Short: the outbox does the waiting and the trying again. MLflow's own defaults would hang for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import mlflow.entities as entities
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from cluster.harmless import redacted
from pipeline.tracking.also import PARENT, Copies, TrackingError
from pipeline.tracking.outbox import Record, Unreachable

STAGE_TAG, PARENT_TAG = "vans.stage", "mlflow.parentRunId"
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's pages open a new experiment as training runs; without it they show an evaluation of language models."""

# The store's answer is about the request itself, so that asking again would not help.
_REFUSED = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "NOT_IMPLEMENTED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


class MlflowStore:
    """Runs of one experiment at ``uri``; ``artifacts`` is where a new experiment keeps files (None: the server's).

    ``copies`` is handed what has been carried out.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None) -> None:
        self.uri = uri
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # else it narrates each new sqlite file
        self.client = MlflowClient(tracking_uri=uri)
        self.copies = Copies({})
        self.run_ids: dict[tuple[str, str], str] = {}  # (parent's id, name) → id
        self._last_steps: dict[str, dict[str, int]] = {}  # run id → metric → last step logged before this process
        with self._start_errors():
            found = self.client.get_experiment_by_name(experiment)
            if found is not None and found.lifecycle_stage != "active":
                raise TrackingError(
                    f"the MLflow experiment {experiment!r} at {redacted(uri)} was deleted; restore it, or choose another name "
                    "(tracking.experiment=…)"
                )
            location = artifacts.resolve().as_uri() if artifacts else None
            self.experiment_id = (
                found.experiment_id if found else self.client.create_experiment(experiment, location, KIND)
            )

    def start(self, name: str, tags: dict[str, str]) -> str:
        """Create a parent run and return its id; raises TrackingError where the store does not answer."""
        with self._start_errors():
            run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self._last_steps[run.info.run_id] = {}
        return self._know(run.info.run_id, PARENT, run.info.run_id)

    def resume(self, run_id: str) -> dict[str, str]:
        """Go on with the parent run ``run_id``; returns the parameters that it has. Raises TrackingError."""
        try:
            with self._start_errors():
                run = self.client.get_run(run_id)
                self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise TrackingError(
                redacted(f"cannot resume the MLflow run {run_id}: not at {self.uri} ({error.message})")
            ) from error
        self._know(run_id, PARENT, run_id)
        return dict(run.data.params)

    def adopt(self, parent: str, name: str, run_id: str) -> None:
        """Take ``run_id`` as the nested run ``name`` of ``parent``."""
        self._know(parent, name, run_id)

    def run_id(self, parent: str, name: str) -> str:
        """Return the id of the nested run ``name`` of ``parent``, creating it at its first use."""
        known = self.run_ids.get((parent, name))
        if known or name == PARENT:
            return self._know(parent, name, known or parent)
        query = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`{STAGE_TAG}` = '{name}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        if found:
            return self._know(parent, name, found[0].info.run_id)
        run = self.client.create_run(self.experiment_id, run_name=name, tags={PARENT_TAG: parent, STAGE_TAG: name})
        self._last_steps[run.info.run_id] = {}
        return self._know(parent, name, run.info.run_id)

    def deliver(self, record: Record) -> None:
        """Carry out one record; raises Unreachable where it should be tried again."""
        action: Callable[[str, Record], Any] = getattr(self, f"_do_{record['op']}")
        path = record.get("path")
        if path and not Path(path).is_file():
            raise TrackingError(f"{path}: the file to log is not there any more")
        try:
            taken = action(self.run_id(record["parent"], record["run"]), record)
        except MlflowException as error:
            if error.error_code in _REFUSED:
                raise
            raise Unreachable(_first_line(error)) from error
        except (OSError, SQLAlchemyError) as error:
            raise Unreachable(_first_line(error)) from error
        self.copies.take(record, taken or ())
        if path and record.get("remove"):
            Path(path).unlink()

    def _do_metrics(self, run_id: str, record: Record) -> list[tuple[str, float, int]]:
        before = self._steps_before(run_id)
        metrics = [entities.Metric(k, v, t, s) for k, v, t, s in record["values"] if s > before.get(k, -1)]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL], synchronous=True)
        return [(metric.key, metric.value, metric.step) for metric in metrics]

    def _do_params(self, run_id: str, record: Record) -> None:
        params = [entities.Param(key, value) for key, value in record["values"].items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL], synchronous=True)

    def _do_tags(self, run_id: str, record: Record) -> None:
        tags = [entities.RunTag(key, value) for key, value in record["values"].items()]
        self.client.log_batch(run_id, tags=tags, synchronous=True)

    def _do_artifact(self, run_id: str, record: Record) -> None:
        self.client.log_artifact(run_id, record["path"], record["to"] or None)

    def _do_image(self, run_id: str, record: Record) -> None:
        from PIL import Image

        with Image.open(record["path"]) as image:
            self.client.log_image(
                run_id, image.convert("RGB"), key=record["key"], step=record["step"], synchronous=True
            )

    def _do_table(self, run_id: str, record: Record) -> None:
        self.client.log_table(run_id, record["columns"], record["to"])

    def _do_dataset(self, run_id: str, record: Record) -> None:
        dataset = entities.Dataset(**record["dataset"])
        tags = [entities.InputTag("mlflow.data.context", record["context"])]
        self.client.log_inputs(run_id, [entities.DatasetInput(dataset, tags)])

    def _do_begin(self, run_id: str, record: Record) -> None:
        self.client.update_run(run_id, status="RUNNING")

    def _do_replay(self, run_id: str, record: Record) -> None:
        self._last_steps.pop(run_id, None)  # read anew: what this process has logged counts as before, too

    def _do_end(self, run_id: str, record: Record) -> None:
        self.client.set_terminated(run_id, record["status"], record["time"])

    def _know(self, parent: str, name: str, run_id: str) -> str:
        self.run_ids[parent, name] = run_id
        return run_id

    def _steps_before(self, run_id: str) -> dict[str, int]:
        """Return how far each metric got before this process, so that steps a resumed run repeats are logged once."""
        if run_id not in self._last_steps:
            names = self.client.get_run(run_id).data.metrics
            histories = {name: self.client.get_metric_history(run_id, name) for name in names}
            self._last_steps[run_id] = {n: max(point.step for point in points) for n, points in histories.items()}
        return self._last_steps[run_id]

    @contextmanager
    def _start_errors(self) -> Iterator[None]:
        try:
            yield
        except MlflowException as error:
            if error.error_code in _REFUSED:
                raise
            raise self._no_answer(error) from error
        except (OSError, SQLAlchemyError) as error:
            raise self._no_answer(error) from error

    def _no_answer(self, error: Exception) -> TrackingError:
        return TrackingError(
            f"the MLflow store at {redacted(self.uri)} does not answer: {_first_line(error)}\n"
            "Start it, correct MLFLOW_TRACKING_URI or tracking.uri, or leave both out for a local file."
        )


def merge_metrics(records: list[Record]) -> list[Record]:
    """Join neighbouring metric records of one run, up to what the store takes in one call."""
    merged: list[Record] = []
    for record in records:
        if merged and _joinable(merged[-1], record):
            merged[-1] = merged[-1] | {"values": merged[-1]["values"] + record["values"]}
        else:
            merged.append(record)
    return merged


def _joinable(a: Record, b: Record) -> bool:
    if a["op"] != "metrics" or any(a[key] != b[key] for key in ("op", "parent", "run")):
        return False
    return len(a["values"]) + len(b["values"]) <= METRICS_PER_CALL


def _first_line(error: Exception) -> str:
    return redacted((str(error).splitlines() or [type(error).__name__])[0][:300])
