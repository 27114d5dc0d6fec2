"""A run stores the rollouts of its steps, and a resumed one those that it repeats once. Hook, loop and tracker are the real ones."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from pipeline.config import RunConfig, load_config
from pipeline.run.after_step import StepHook
from pipeline.run.recovery import Restarts
from pipeline.run.train import Run
from pipeline.stages.alarms import AlarmWatch
from pipeline.stages.feed import SampleFeed
from pipeline.stages.loop import StepReport, run_stage
from pipeline.support.progress import bar
from pipeline.tracking import Tracker
from pipeline.tracking.rollouts import FOLDER, read_step, stored_steps
from tests.pipeline.run.test_alarm_stop import SavingLearner
from tests.pipeline.stages.test_feed import Numbers
from tests.pipeline.stages.test_loop import CountingStage

pytestmark = pytest.mark.slow
STEPS = 5


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sqlite store for all tests of the module: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store") / "mlflow.db"


def go(config: RunConfig, first: int, last: int) -> tuple[str, str]:
    """Run the steps ``first`` to ``last`` of a stage that counts, without a checkpoint; returns the console's text and the run's id."""
    paper = Console(file=io.StringIO(), width=200)
    stage, learner, feed = CountingStage(0, steps=last), SavingLearner(version=first), SampleFeed(Numbers(), 2)
    stage.fleet.vlm.version = first
    with Tracker.start(config, strict=False) as tracker, tracker.stage("stage1"):
        run = Run(config, tracker, paper, feed, None)
        with bar(paper, "stage 1", last, first) as progress:
            hook = StepHook(
                config,
                run.keeper,
                stage,  # type: ignore[arg-type]
                {"vlm": learner},  # type: ignore[dict-item]
                AlarmWatch(config.alarms, ("x",)),
                progress,
                Restarts("stage1", 0, "vans train"),
                rollouts=run.rollouts,
            )

            async def on_step(report: StepReport) -> bool:
                over = await hook(report)
                # These steps take milliseconds; without a wait some would be left out, as too many waited.
                assert await asyncio.to_thread(run.rollouts.flush, 30.0)
                return over

            asyncio.run(run_stage(stage, feed, {"vlm": learner}, first_step=first, on_step=on_step))  # type: ignore[arg-type]
        run.rollouts.close()
        return paper.file.getvalue(), tracker.run_ids["stage1"]  # type: ignore[attr-defined]


def settings(out: Path, database: Path, *more: str) -> RunConfig:
    values = [f"out={out}", f"tracking.uri=sqlite:///{database}", "tracking.clips_every=0", "checkpoint.every=0"]
    return load_config("toy", [*values, *more])


def test_a_resumed_run_has_each_step_once_with_the_figures_of_its_step(database: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", database, "tracking.rollouts={clips: none}")
    go(config, 0, 4)
    go(config, 2, STEPS)  # killed after step 3, with a checkpoint after step 1
    found = stored_steps(config.out)
    assert [(each.stage, each.step) for each in found] == [("stage1", step) for step in range(STEPS)]
    for each in found:
        rows, note = read_step(each.path)
        assert [(row["step"], row["group"], row["index"]) for row in rows] == [
            (each.step, g, i) for g in (0, 1) for i in (0, 1)
        ]
        assert [row["scores"] for row in rows] == [{"x": 0.0}, {"x": 1.0}] * 2
        assert note["weights"] == {"x": 1.0} and note["figures"]["reward/total_mean"] == 0.5
        assert note["figures"]["stage/step"] == each.step


def test_every_and_keep_steps_say_which_steps_are_there(database: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", database, "tracking.rollouts={every: 2, keep_steps: 2, clips: none}")
    go(config, 0, STEPS)
    assert [each.step for each in stored_steps(config.out)] == [2, 4]
    off = settings(tmp_path / "off", database, "tracking.rollouts={every: 0}")
    go(off, 0, 2)
    assert not (off.out / FOLDER).exists()


def test_a_disk_that_takes_no_rollouts_costs_the_run_nothing_but_them(database: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", database)
    config.out.mkdir(parents=True)
    (config.out / FOLDER).write_text("a file where the folder should be")
    text, run_id = go(config, 0, STEPS)
    assert "are not stored" in text and "5/5" in text
    client = MlflowClient(f"sqlite:///{database}")
    lost = [point.value for point in client.get_metric_history(run_id, "tracking/rollouts_lost")]
    assert lost == sorted(lost) and 1.0 <= lost[-1] <= STEPS
