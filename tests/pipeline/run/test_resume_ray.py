"""kill -9 of the driver in the middle of stage 2: ``--resume`` goes on from the last checkpoint, as one run in MLflow."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from cluster.session import connect
from pipeline.config import load_config
from pipeline.run.train import run_training
from tests.processes import command, kill, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]


@pytest.mark.timeout(600)
def test_a_run_whose_driver_was_killed_goes_on(ray_alone: None, toy_shards: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = ["toy", f"out={out}", f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test"]
    arguments += ["stage1.steps=2", "stage2.steps=3", "stage2.anchor_min_rouge=0.2", "checkpoint.every=1"]
    arguments += ["stage1.optim.ema=0.5", "stage2.optim.ema=0.5", "stage2.rollout.max_refills=1"]
    for stage, prompts in (("stage1", 4), ("stage2", 2)):
        arguments += [f"{stage}.rollout.prompts_per_step={prompts}", f"{stage}.rollout.group_size=4"]

    with command(log, "train", *arguments) as first:
        until((out / "checkpoints" / "stage2-step000001" / "manifest.json").is_file, first, log)
        kill(first)
    assert not (out / "vdm_adapter").exists()

    with command(log, "train", *arguments, "--resume") as second:
        assert second.wait(timeout=300) == 0, log.read_text()

    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 3 and {run.info.status for run in runs.values()} == {"FINISHED"}
    for stage, steps in (("stage1", 2), ("stage2", 3)):
        history = client.get_metric_history(runs[stage].info.run_id, "reward/total_mean")
        assert sorted(m.step for m in history) == list(range(steps))  # none lost, none doubled
    assert (out / "vdm_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.timeout(600)
def test_a_run_without_stage_one_goes_on_in_stage_two(ray_alone: None, toy_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = [f"out={out}", f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test"]
    overrides += ["stage1.steps=0", "stage2.anchor=truth", "stage2.steps=1", "pools.vdm.workers=1", "learner.ranks=1"]
    overrides += ["stage2.rollout={prompts_per_step: 1, group_size: 2}", "tracking.clips_every=0"]
    config = load_config("toy", overrides)
    with connect(local_cpus=8):  # one cluster for both
        run_training(config)
        report = run_training(config, resume=True)
    assert report.stages.keys() == {"stage2"}
    assert not (out / "vlm_adapter").exists() and (out / "vdm_adapter" / "adapter_model.safetensors").is_file()
