"""Read back what a job logged: every step's figures of its stage runs, resumed steps included once."""

from __future__ import annotations

from mlflow import MlflowClient

from pipeline.tracking.store import PARENT_TAG, STAGE_TAG

Series = dict[str, list[tuple[int, float]]]


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
