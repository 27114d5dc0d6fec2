"""A run under watch: its alarms are in the console and in MLflow, and stop it only after a checkpoint was written.

Step hook, tracker and checkpoint store are the real ones; the stage counts instead of training.
"""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from rich.console import Console

from actors.records import Sample, Scores
from cluster.errors import TrainingError
from pipeline.checkpoint import CheckpointStore, require_same_config
from pipeline.config import RunConfig, load_config
from pipeline.run.after_step import StepHook
from pipeline.run.recovery import Restarts
from pipeline.run.train import Run
from pipeline.stages.alarms import AlarmWatch
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.groups import Group, Member
from pipeline.stages.loop import run_stage
from pipeline.support.progress import bar
from pipeline.tracking import Tracker
from rewards.alarms import AlarmState
from tests.pipeline.stages.test_feed import Numbers
from tests.pipeline.stages.test_loop import CountingStage, Learner

MOTION = (1.0, 1.0, 0.05, 0.05, 1.0, 1.0, 0.05, 0.05, 0.05, 0.05)


@dataclass
class FreezingStage(CountingStage):
    """Its clips move as ``MOTION`` says, step by step."""

    async def group(self, sample: Sample, step: int) -> Group:
        signs = {"motion_ratio": MOTION[step]}
        return Group(sample, tuple(Member(i, "c", Scores(sample.id, i, {"x": float(i)}, signs)) for i in range(2)))


class SavingLearner(Learner):
    """A learner whose state is its version."""

    async def save(self, path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "version").write_text(str(self.version))

    async def restore(self, path: str) -> None:
        self.version = int((Path(path) / "version").read_text())

    async def export(self, path: str) -> None:
        Path(path).mkdir()


def go(config: RunConfig, resume: bool = False) -> str:
    """Run the stage to its end or to the error that stops it, as ``Run.stage`` does; returns the console's text."""
    paper = Console(file=io.StringIO(), width=200)
    store = CheckpointStore(config.out / "checkpoints")
    checkpoint = store.latest() if resume else None
    stage, learner = FreezingStage(0, steps=len(MOTION)), SavingLearner()
    alarms, first, cursor = AlarmWatch(config.alarms, ("x",)), 0, None
    if checkpoint is not None:
        state = checkpoint.state
        require_same_config(state, config)
        alarms.state, first = AlarmState.from_json(state.extra["alarms"]), state.step
        asyncio.run(learner.restore(str(checkpoint.path / "vlm_learner")))
        cursor = FeedCursor.from_json(state.cursor)
    feed = SampleFeed(Numbers(), 2, *([cursor] if cursor else []))
    parent = checkpoint.state.mlflow_run_ids["parent"] if checkpoint else None
    try:
        with Tracker.start(config, resume_run_id=parent, strict=False) as tracker, tracker.stage("stage1"):
            run = Run(config, tracker, paper, feed, checkpoint, run_ids={"parent": tracker.run_id})
            with bar(paper, "stage 1", len(MOTION), first) as progress:
                restarts = Restarts("stage1", 0, "vans train")
                hook = StepHook(config, run.keeper, stage, {"vlm": learner}, alarms, progress, restarts)  # type: ignore[arg-type]
                asyncio.run(run_stage(stage, feed, {"vlm": learner}, first_step=first, on_step=hook))  # type: ignore[arg-type]
    finally:
        paper.file.flush()
    return paper.file.getvalue()  # type: ignore[attr-defined]


def settings(out: Path, *more: str) -> RunConfig:
    return load_config(
        "toy", [f"out={out}", "checkpoint.every=0", "alarms.patience=1", "tracking.clips_every=0", *more]
    )


def alarms_of(config: RunConfig) -> tuple[dict[str, str], list[tuple[int, float]]]:
    """The stage's alarm tags and its curve of ``alarm/on`` in MLflow."""
    client = mlflow.MlflowClient(f"sqlite:///{config.out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'stage1'")
    curve = client.get_metric_history(run.info.run_id, "alarm/on")
    tags = {name: text for name, text in run.data.tags.items() if name.startswith("alarm.")}
    return tags, sorted((point.step, point.value) for point in curve)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, str]:
    config = settings(tmp_path_factory.mktemp("alarms") / "whole")
    return config, go(config)


def test_alarms_are_told_once_in_the_console_and_in_mlflow(whole: tuple[RunConfig, str]) -> None:
    config, text = whole
    lines = [line for line in text.splitlines() if " · alarm " in line]
    assert [line.partition(" · ")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    assert "motion: clips move 0.05 times as much as ground truth (alarm below 0.2)" in lines[0]
    tags, curve = alarms_of(config)
    assert list(tags) == ["alarm.motion"] and tags["alarm.motion"].startswith("on since step 6: motion:")
    assert [value for _, value in curve] == [float(motion < 0.2) for motion in MOTION]


def test_the_stop_comes_after_a_checkpoint_and_a_resumed_run_has_the_same_alarms(
    whole: tuple[RunConfig, str], tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", "alarms.stop_after=3")
    with pytest.raises(TrainingError, match=r"stopped after 9 steps.*3 steps in a row.*motion.*alarms.stop_after=0"):
        go(config)
    checkpoint = CheckpointStore(config.out / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step == 9
    assert (checkpoint.path / "vlm_learner" / "version").read_text() == "9"
    text = go(settings(tmp_path / "run", "alarms.stop_after=0"), resume=True)
    assert " · alarm " not in text, "it was told before the run was stopped"
    assert alarms_of(config) == alarms_of(whole[0])


def test_the_bar_in_a_terminal_keeps_the_line_above_it() -> None:
    paper = Console(file=io.StringIO(), force_terminal=True, width=120)
    with bar(paper, "stage 1", 2) as progress:
        progress.say("step 0 · alarm [motion]", "bold yellow")
        progress.advance("reward 0.5")
    assert "step 0 · alarm [motion]" in paper.file.getvalue()  # type: ignore[attr-defined]
