"""Read back what a job logged: every step's figures of its stage runs, resumed steps included once."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlflow import MlflowClient

from pipeline.tracking.store import PARENT_TAG, STAGE_TAG

Series = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class JobRun:
    """What MLflow says about a job: its status, when it began and ended in seconds since the epoch, its tags and last figures."""

    id: str
    status: str
    start: float
    end: float | None
    tags: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def read_job(uri: str, parent_id: str) -> JobRun:
    """Return what MLflow says about the job ``parent_id``."""
    run = MlflowClient(tracking_uri=uri).get_run(parent_id)
    end = run.info.end_time / 1e3 if run.info.end_time else None
    return JobRun(
        parent_id, run.info.status, run.info.start_time / 1e3, end, dict(run.data.tags), dict(run.data.metrics)
    )


def read_stages(uri: str, parent_id: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, Series]:
    """Return stage → metric → (step, value) in the order of steps, for the metrics that begin with one of ``prefixes``."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_run(parent_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent_id}'")
    found: dict[str, Series] = {}
    for child in children:
        names = [name for name in child.data.metrics if name.startswith(prefixes)]
        found[child.data.tags.get(STAGE_TAG, child.info.run_name)] = {
            name: sorted({m.step: m.value for m in client.get_metric_history(child.info.run_id, name)}.items())
            for name in sorted(names)
        }
    return found


def newest_parent(uri: str, experiment: str, name: str) -> str | None:
    """Return the id of the newest job called ``name`` in ``experiment`` at ``uri``, or None where there is none."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    runs = client.search_runs(
        [found.experiment_id], f"attributes.run_name = '{name}'", order_by=["attributes.start_time DESC"]
    )
    return next((run.info.run_id for run in runs if PARENT_TAG not in run.data.tags), None)


def stage_windows(uri: str, parent_id: str) -> dict[str, tuple[float, float]]:
    """Return stage → (start, end) of its run in seconds since the epoch; one that has not ended ends at infinity."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_run(parent_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent_id}'")
    return {
        child.data.tags.get(STAGE_TAG, child.info.run_name): (
            child.info.start_time / 1e3,
            child.info.end_time / 1e3 if child.info.end_time else float("inf"),
        )
        for child in children
    }
