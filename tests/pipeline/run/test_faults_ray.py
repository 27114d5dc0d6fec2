"""Faults of a whole run, done for real: signals to the driver, ranks killed, stopped and kept from writing, rewards that fail."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import mlflow
import pytest

from pipeline.checkpoint import CheckpointStore
from tests.processes import PATIENCE_S, command, family, members, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(1500)]


def arguments(out: Path, shards: Path, *more: str) -> list[str]:
    values = ["toy", f"out={out}", f"data.train={shards}/train", f"data.eval={shards}/test", "tracking.clips_every=0"]
    values += ["stage2.anchor=truth", "pools.vdm.workers=1"]
    for stage, prompts in (("stage1", 4), ("stage2", 2)):
        values += [f"{stage}.rollout.prompts_per_step={prompts}", f"{stage}.rollout.group_size=4"]
    return [*values, *more]


def curves(out: Path, name: str = "reward/total_mean") -> dict[str, list[tuple[int, float]]]:
    """Each stage's points as they were logged, in the order of steps: a step logged twice is there twice."""
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    found = {}
    for run in client.search_runs([experiment.experiment_id], "tags.vans.stage != 'parent'"):
        points = client.get_metric_history(run.info.run_id, name)
        found[run.info.run_name] = sorted((m.step, m.value) for m in points)
    return found


def statuses(out: Path) -> dict[str, str]:
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}


def test_sigterm_in_a_rollout_and_ctrl_c_at_the_start_lose_nothing(
    ray_alone: None, toy_shards: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    given = arguments(out, toy_shards, "stage1.steps=3", "stage2.steps=0", "checkpoint.every=0")
    with command(log, "train", *given) as first:
        until(lambda: "thinker 1/3" in log.read_text(), first, log)
        time.sleep(0.3)  # into the rollout of the next step
        first.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert first.wait(120) == 128 + signal.SIGTERM, log.read_text()[-8000:]
        print(f"ended {time.monotonic() - asked:.1f} s after SIGTERM")
    checkpoint = CheckpointStore(out / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step in (1, 2)
    assert "--resume" in log.read_text() and "Traceback" not in log.read_text()
    assert statuses(out) == {"toy": "KILLED", "stage1": "KILLED"}
    assert [step for step, _ in curves(out)["stage1"]] == list(range(checkpoint.step))

    resumed = [str(out / "config.yaml"), "--resume"]  # the command that the message names
    with command(log, "train", *resumed) as second:
        until(lambda: len(family(second)) > 6, second, log)  # Ray is up, the pools are starting
        second.send_signal(signal.SIGINT)
        assert second.wait(120) == 128 + signal.SIGINT, log.read_text()[-8000:]
    with command(log, "train", *resumed) as third:
        assert third.wait(PATIENCE_S) == 0, log.read_text()[-8000:]
    assert [step for step, _ in curves(out)["stage1"]] == [0, 1, 2]
    assert set(statuses(out).values()) == {"FINISHED"}
    assert "Traceback" not in log.read_text()


def test_ranks_that_die_hang_or_cannot_write_do_not_end_the_run(
    ray_alone: None, toy_shards: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    given = arguments(out, toy_shards, "stage1.steps=5", "stage2.steps=2", "checkpoint.every=1", "checkpoint.keep=9")
    given += ["learner.step_timeout_s=40"]

    def written(name: str) -> bool:
        return (out / "checkpoints" / name / "manifest.json").is_file()

    with command(log, "train", *given) as run:
        until(lambda: written("stage1-step000001"), run, log)
        os.kill(members(run, "LearnerRank")[1].pid, signal.SIGKILL)
        until(lambda: written("stage1-step000003"), run, log)
        limited = members(run, "LearnerRank")
        assert len(limited) == 2
        for rank in limited:  # a full disk, as far as this process can tell: EFBIG
            resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
        until(lambda: "could not be written" in log.read_text(), run, log)
        for rank in limited:
            resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: written("stage2-step000001"), run, log)
        os.kill(members(run, "LearnerRank")[0].pid, signal.SIGSTOP)
        assert run.wait(PATIENCE_S) == 0, log.read_text()[-8000:]
    assert "Traceback" not in log.read_text()
    for stage, steps in (("stage1", 5), ("stage2", 2)):
        assert [step for step, _ in curves(out)[stage]] == list(range(steps))
        assert curves(out, "learner/restarts")[stage][-1] == (steps - 1, 1.0)
    assert curves(out, "checkpoint/failed")["stage1"] == [(3, 1.0)]
    assert not written("stage1-step000004") and written("stage1-step000005")
    assert set(statuses(out).values()) == {"FINISHED"}


REWARDS = """
def sometimes(*, sample_id, text, **_):
    return float("nan") if len(text) % 3 == 0 else len(text) / 100

def never(**_):
    return float("nan")

def broken(*, text, **_):
    return {}[text]
"""


def test_rewards_that_are_nan_leave_their_group_and_never_the_run(
    ray_alone: None, toy_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "house_rewards.py").write_text(REWARDS)
    out, log = tmp_path / "run", tmp_path / "log"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    given = arguments(out, toy_shards, "stage1.steps=3", "stage2.steps=0", "stage1.rollout.max_failed_ratio=0.9")
    given += ['stage1.rewards.weights={"house_rewards:sometimes": 1.0}']
    with command(log, "train", *given, PYTHONPATH=path) as run:
        assert run.wait(PATIENCE_S) == 0, log.read_text()[-8000:]
    failed, rewards = curves(out, "rollout/failed_members")["stage1"], curves(out)["stage1"]
    assert sum(value for _, value in failed) > 0
    assert len(rewards) == 3 and all(value == value for _, value in rewards)
    assert sum(value for _, value in curves(out, "learner/applied")["stage1"]) == 3


@pytest.mark.parametrize(
    ("name", "told"),
    [("never", "is nan"), ("broken", "KeyError")],
    ids=["NaN for every sample", "an exception"],
)
def test_rewards_that_never_work_stop_the_run_and_say_why(
    ray_alone: None, toy_shards: Path, tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "house_rewards.py").write_text(REWARDS)
    log = tmp_path / "log"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    given = arguments(tmp_path / "run", toy_shards, "stage1.steps=9", "stage2.steps=0")
    given += [f'stage1.rewards.weights={{"house_rewards:{name}": 1.0}}']
    with command(log, "train", *given, PYTHONPATH=path) as run:
        assert run.wait(PATIENCE_S) == 2, log.read_text()[-8000:]
    assert told in log.read_text()
