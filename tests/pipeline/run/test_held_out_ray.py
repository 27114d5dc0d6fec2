"""Evaluation while a run trains, whole and real: a run that is killed and resumed has the same curve and the same best.

The curve, the best, its export and the early end of one run: ``tests/pipeline/test_job_submit_ray.py``, whose job does that too.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from actors.weights.files import read_weights
from pipeline.checkpoint import CheckpointStore
from pipeline.tracking.store import PARENT_TAG, STAGE_TAG
from tests.processes import command, kill, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

Curves = dict[str, list[tuple[int, float]]]


def overrides(out: Path, shards: Path, *more: str) -> list[str]:
    return [
        f"out={out}",
        *(f"data.{key}={shards}/{split}" for key, split in (("train", "train"), ("val", "val"), ("eval", "test"))),
        "evaluate.every=1",
        "evaluate.subset=4",
        "stage1.rollout={prompts_per_step: 2, group_size: 4}",
        "stage2.rollout={prompts_per_step: 1, group_size: 4}",
        "stage2.anchor=truth",
        "stage2.optim.ema=0.5",
        "checkpoint.every=0",
        "tracking.clips_every=0",
        *more,
    ]


def curves(out: Path) -> tuple[Curves, dict[str, dict[str, str]]]:
    """``stage/evaluate/…`` → its points in MLflow, doubled ones included, and each stage's tags."""
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.data.tags[STAGE_TAG]: run for run in runs if PARENT_TAG in run.data.tags}
    found = {
        f"{stage}/{name}": sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, name))
        for stage, run in stages.items()
        for name in run.data.metrics
        if name.startswith("evaluate/")
    }
    return found, {stage: run.data.tags for stage, run in stages.items()}


@pytest.mark.timeout(900)
def test_a_run_that_was_killed_finds_the_same_best_by_the_same_curve(
    ray_alone: None, toy_shards: Path, tmp_path: Path
) -> None:
    peaceful, killed, log = tmp_path / "peaceful", tmp_path / "killed", tmp_path / "log"
    more = ["deterministic=true", "stage1.steps=3", "stage2.steps=3", "checkpoint.every=1", "checkpoint.keep=1"]
    more += ["stage1.optim.lr=0.01", "stage2.optim.lr=0.003"]
    with command(log, "train", "toy", *overrides(peaceful, toy_shards, *more)) as process:
        assert process.wait(timeout=400) == 0, log.read_text()
    arguments = ["train", "toy", *overrides(killed, toy_shards, *more)]
    for place in ("stage1-step000001", "stage2-step000002"):
        with command(log, *arguments) as process:
            until((killed / "checkpoints" / place / "manifest.json").is_file, process, log)
            kill(process)
        arguments = ["train", "toy", *overrides(killed, toy_shards, *more), "--resume"]
    with command(log, *arguments) as process:
        assert process.wait(timeout=400) == 0, log.read_text()

    (expected, _), (found, _) = curves(peaceful), curves(killed)
    assert found == expected
    for stage in ("stage1", "stage2"):
        assert [step for step, _ in found[f"{stage}/evaluate/clip_v"]] == [0, 1, 2, 3]
    told, ours = (json.loads((out / "best" / "best.json").read_text()) for out in (peaceful, killed))
    assert told == ours
    kept = [{path.name for path in CheckpointStore(out / "checkpoints").paths()} for out in (peaceful, killed)]
    assert kept[0] == kept[1] == {"stage1-step000003", "stage2-step000003", f"{told['stage']}-step{told['step']:06d}"}
    for folder in (peaceful / "best").glob("*_adapter"):
        tensors, same = (read_weights(place).tensors for place in (folder, killed / "best" / folder.name))
        assert tensors.keys() == same.keys() and all(np.array_equal(tensors[name], same[name]) for name in tensors)
