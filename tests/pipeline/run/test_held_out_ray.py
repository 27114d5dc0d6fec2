"""Evaluation while a run trains, whole and real: the curve, the best, its export, the early end; killed and resumed alike."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from actors.weights.files import read_weights
from pipeline.checkpoint import CheckpointStore
from pipeline.config import load_config
from pipeline.data.toy.language import language_in
from pipeline.data.toy.shards import write_toy
from pipeline.run.train import run_training
from pipeline.stages.loop import StepReport
from pipeline.tracking.profile import read_profiles
from pipeline.tracking.store import PARENT_TAG, STAGE_TAG
from tests.processes import command, kill, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_chinese_run_evaluates_itself_ends_a_stage_that_gets_no_better_and_exports_the_best(
    ray_local: None, tmp_path: Path
) -> None:
    out, shards = tmp_path / "run", tmp_path / "toy"
    write_toy(shards, train=8, test=4, language="zh")
    captions: list[str] = []

    def see(stage: str, report: StepReport) -> None:
        captions.extend(m.caption for g in report.batch.groups for m in g.members if m.caption)

    small = ["stage1.steps=4", "stage2.steps=1", "pools.vdm.workers=1", "learner.ranks=1"]
    small += ["evaluate.stop_if_not_better=1", "stage1.optim.lr=1e-12"]  # nothing moves, so no answer changes …
    small += ["deterministic=true"]  # … by the rounding of its batch either
    config = load_config("toy", overrides(out, shards, *small))
    report = run_training(config, on_step=see)
    assert [(name, stage.steps) for name, stage in report.stages.items()] == [("stage1", 1), ("stage2", 1)]

    assert len(captions) >= 8 and sum(language_in(text) == "zh" for text in captions) > len(captions) / 2
    found, tags = curves(out)
    assert all(0.1 < value <= 1 for _, value in found["stage1/evaluate/rouge_l"])  # read by characters
    for stage in ("stage1", "stage2"):
        assert [step for step, _ in found[f"{stage}/evaluate/clip_v"]] == [0, 1]
    (_, base), (_, same) = found["stage1/evaluate/clip_v"]
    assert base == same and found["stage1/evaluate/since_best"] == [(0, 0.0), (1, 1.0)]
    assert "ends after 1 steps" in tags["stage1"]["vans.stopped_early"]

    told = json.loads((out / "best" / "best.json").read_text())
    best = max(  # of the run; of equal ones the earlier
        (value, -number, stage, step)
        for number, stage in enumerate(("stage1", "stage2"))
        for step, value in found[f"{stage}/evaluate/clip_v"][: 1 if stage == "stage1" else 2]
    )
    assert (told["value"], told["stage"], told["step"]) == (best[0], best[2], best[3])
    checkpoint = CheckpointStore(out / "checkpoints").load(
        out / "checkpoints" / f"{told['stage']}-step{told['step']:06d}"
    )
    policy = {"stage1": "vlm_adapter", "stage2": "vdm_adapter"}[told["stage"]]
    ours, theirs = (read_weights(folder / policy).tensors for folder in (out / "best", checkpoint.path))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in out.glob(".best*")} == set()
    assert all(profile.parts["held-out evaluation"] > 0 for profile in read_profiles(out))
    assert {path.name for path in out.glob("*_adapter")} == {"vlm_adapter", "vdm_adapter"}


@pytest.mark.chaos
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
