"""A deterministic run that is killed at every named point, and resumed each time, ends bitwise as one that was left in peace."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pytest
from safetensors.numpy import load_file

from pipeline.tracking.store import PARENT_TAG, STAGE_TAG
from tests.chaos.soak import CLOCK

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

KILLER = Path(__file__).with_name("kill_at.py")

# Where each process of the run is killed, in this order; the counts are of that process. Checkpoints are written after steps
# 2 and 4 of stage 1, and after steps 2 and 3 of stage 2, so that most deaths undo a step.
DEATHS = [
    ("mid_rollout", 4),
    ("mid_update", 2),
    ("before_weights_are_served", 2),
    ("metrics_logged", 1),
    ("while_weights_load", 3),
    ("mid_checkpoint", 1),
    ("before_the_rename", 1),
    ("checkpoint_written", 1),
    ("mid_export", 1),
    ("stage_change", 1),
    ("mid_rollout", 3),
    ("metrics_logged", 1),
    ("mid_update", 1),
]
STEPS = {"stage1": 4, "stage2": 3}


def arguments(out: Path, shards: Path) -> list[str]:
    values = ["toy", f"out={out}", f"data.train={shards}/train", f"data.eval={shards}/test", "deterministic=true"]
    values += [f"{stage}.steps={steps}" for stage, steps in STEPS.items()] + ["checkpoint.every=2"]
    values += ["stage1.rollout={prompts_per_step: 3, group_size: 4, max_refills: 1}", "stage1.optim.ema=0.5"]
    values += [
        "stage2.rollout={prompts_per_step: 2, group_size: 4}",
        "stage2.anchor_min_rouge=0.2",
        "stage2.optim.ema=0.5",
    ]
    return [*values, "stage2.render.steps=6", "tracking.clips_every=2"]


def run(command: list[str], log: Path) -> int:
    """Run ``command`` to its end, and end what a killed one leaves behind, as the end of its machine would."""
    with log.open("ab") as stream:
        process = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=stream, env=dict(os.environ))
    family: list[psutil.Process] = []
    while process.poll() is None:
        try:
            family = psutil.Process(process.pid).children(recursive=True) or family
            process.wait(timeout=0.05)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
            continue
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    return process.returncode


def weights(out: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor that the run leaves, optimizer states in its checkpoints included, by place.

    Not of the files: their headers list tensors in an order that differs between processes.
    """
    return {
        f"{path.relative_to(out)}:{name}": hashlib.sha256(tensor.tobytes()).hexdigest()
        for path in sorted(out.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def histories(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Return ``stage/metric`` → every point that MLflow holds, doubled ones included, but for the clock's."""
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3, "a job and its two stages, however often it was resumed"
    assert {run.info.status for run in runs} == {"FINISHED"}
    found = {}
    for stage in (run for run in runs if PARENT_TAG in run.data.tags):
        for name in stage.data.metrics:
            if not name.startswith(CLOCK):
                points = client.get_metric_history(stage.info.run_id, name)
                found[f"{stage.data.tags[STAGE_TAG]}/{name}"] = sorted((p.step, p.value) for p in points)
    return found


@pytest.mark.timeout(3000)
def test_a_run_killed_at_every_point_ends_as_one_that_was_not(
    ray_alone: None, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaceful, killed, log = tmp_path / "peaceful", tmp_path / "killed", tmp_path / "log"
    assert run(["-m", "pipeline", "train", *arguments(peaceful, toy_shards)], log) == 0, log.read_text()

    resume: list[str] = []
    for point, times in DEATHS:
        command = [str(KILLER), point, str(times), "train", *arguments(killed, toy_shards), *resume]
        assert run(command, log) == -signal.SIGKILL, f"{point} {times} was not reached: {log.read_text()}"
        resume = ["--resume"]
    assert run(["-m", "pipeline", "train", *arguments(killed, toy_shards), "--resume"], log) == 0, log.read_text()

    expected, found = histories(peaceful), histories(killed)
    for stage, steps in STEPS.items():
        assert [step for step, _ in found[f"{stage}/reward/total_mean"]] == list(range(steps))
    assert found == expected
    assert weights(killed) == weights(peaceful)
    assert {"vlm_adapter", "vdm_adapter", "checkpoints"} == {place.split("/")[0] for place in weights(peaceful)}
    with capsys.disabled():
        points = sum(map(len, found.values()))
        print(
            f"\n{len(DEATHS)} deaths at {len({p for p, _ in DEATHS})} points: {points} metric values and {len(weights(killed))} "
            "tensors bitwise equal to the undisturbed run's"
        )
