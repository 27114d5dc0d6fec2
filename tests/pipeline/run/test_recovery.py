"""A stage that loses its learner group, cannot write a checkpoint, or is asked to stop: what is learnt in the end is the same.

The run, its step hook, tracker and checkpoint store are the real ones; learner and pools are counters whose weights are the list
of all samples learnt from. The same with real ranks is in ``test_faults_ray.py``.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from actors.learner.group import RankDiedError, RankSilentError
from actors.learner.objectives.settings import TokenGrpoSection
from actors.learner.settings import OptimSection
from actors.records import Sample
from cluster.errors import CheckpointWriteError, TrainingError
from pipeline.checkpoint import Checkpoint, CheckpointStore
from pipeline.config import RunConfig, load_config
from pipeline.run.after_step import OnStep
from pipeline.run.start import stopped_message
from pipeline.run.train import Run
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.groups import Group
from pipeline.stages.loop import StepReport
from pipeline.support.interrupt import RunStopped, stop_on_signals
from pipeline.tracking import Tracker
from pipeline.tracking.history import read_stages
from tests.pipeline.stages.test_feed import Numbers
from tests.pipeline.stages.test_loop import CountingStage, Fleet, Pool

pytestmark = pytest.mark.slow

STEPS = 6


@dataclass
class World:
    """What goes wrong, and what was seen: outlives learners and stages."""

    faults: dict[tuple[str, int], Exception | None] = field(default_factory=dict)  # (method, nth call of all) → error
    calls: Counter[str] = field(default_factory=Counter)
    served: list[int] = field(default_factory=list)  # versions, in the order in which the pool was set to them
    asked: dict[int, list[int]] = field(default_factory=dict)  # step → how many samples its weights had learnt from
    learners: list[CountingLearner] = field(default_factory=list)

    def call(self, method: str) -> None:
        self.calls[method] += 1
        error = self.faults.get((method, self.calls[method]))
        if error is not None:
            raise error

    @asynccontextmanager
    async def learners_open(self, *_: object) -> AsyncIterator[Any]:
        """Start a learner that counts, in place of a run's groups."""
        learner = CountingLearner(self)
        await learner.start()
        self.learners.append(learner)
        yield {"vlm": learner}


@dataclass
class CountingLearner:
    world: World
    seen: list[str] = field(default_factory=list)
    count: int = 0
    first_version: int = 0

    class spec:
        optim = OptimSection()
        learning = TokenGrpoSection()

    @property
    def version(self) -> int:
        return self.first_version + self.count

    async def start(self) -> None:
        self.world.call("start")

    async def update(self, items: list[str], *, updates: int, epochs: int) -> dict[str, float]:
        self.world.call("update")
        self.seen += items
        self.count += 1
        return {"loss": float(len(self.seen))}

    async def publish(self, *, receivers: int = 0) -> list[Any]:
        self.world.call("publish")
        return list(self.seen)

    async def base_hash(self) -> str:
        return "base"

    async def save(self, folder: str) -> None:
        Path(folder).mkdir()
        self.world.call("save")
        Path(folder, "state.json").write_text(json.dumps([self.seen, self.count]))

    async def restore(self, folder: str) -> None:
        self.world.call("restore")
        self.seen, self.count = json.loads(Path(folder, "state.json").read_text())

    async def export(self, folder: str) -> None:
        self.world.call("export")
        Path(folder).mkdir(exist_ok=True)


@dataclass
class ServingPool(Pool):
    world: World = field(default_factory=World)
    weights: list[str] = field(default_factory=list)

    async def set_weights(self, version: int, payload: Any) -> None:
        await super().set_weights(version, payload)
        self.weights = list(payload or [])
        self.world.served.append(version)


@dataclass
class ServedStage(CountingStage):
    world: World = field(default_factory=World)
    title: str = "stage 1"
    signal_at: int = -1

    async def group(self, sample: Sample, step: int) -> Group:
        pool: Any = self.fleet.vlm
        self.world.asked.setdefault(step, []).append(len(pool.weights))
        if step == self.signal_at:
            self.world.calls["group"] += 1
        if step == self.signal_at and self.world.calls["group"] == 1:  # a second signal would end pytest
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        return await super().group(sample, step)


def settings(out: Path, *more: str) -> RunConfig:
    name = out.parent.name
    return load_config(
        "toy", [f"out={out}", f"tracking.experiment={name}", "checkpoint.every=2", "tracking.clips_every=0", *more]
    )


@pytest.fixture(scope="module", autouse=True)
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One store for all tests, an experiment for each: making a store takes longer than a test."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


def go(
    config: RunConfig,
    world: World,
    *,
    staleness: int = 0,
    signal_at: int = -1,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> str:
    """Train one stage as ``run_training`` does; returns the console's text."""
    paper = Console(file=io.StringIO(), width=300)
    checkpoint: Checkpoint | None = CheckpointStore(config.out / "checkpoints").latest() if resume else None
    state = checkpoint.state if checkpoint else None
    fleet = Fleet(vlm=ServingPool("vlm", world=world))
    feed = SampleFeed(Numbers(), 2, *([FeedCursor.from_json(state.cursor)] if state else []))  # type: ignore[arg-type]
    ids = state.mlflow_run_ids if state else {}

    def kind(config: RunConfig, fleet: Fleet) -> ServedStage:
        return ServedStage(staleness, steps=STEPS, fleet=fleet, world=world, signal_at=signal_at)

    with (
        stop_on_signals(lambda stop: stopped_message(config, stop)) as stop,
        Tracker.start(config, resume_run_id=ids.get("parent"), strict=False) as tracker,
    ):
        ids = ids | {"parent": tracker.run_id}
        run = Run(
            config,
            tracker,
            paper,
            feed,
            checkpoint,
            run_ids=ids,
            stop=stop,
            open_learners=world.learners_open,
            on_step=on_step,
        )
        stop.run(run.stage(kind, fleet, state))  # type: ignore[arg-type]
    return paper.file.getvalue()  # type: ignore[attr-defined]


def losses(config: RunConfig, name: str = "learner/loss") -> list[tuple[int, float]]:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    (parent,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'toy'")
    (child,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'stage1'")
    points = [(m.step, m.value) for m in client.get_metric_history(child.info.run_id, name)]
    assert len({step for step, _ in points}) == len(points), "a step was logged twice"
    assert sorted(points) == read_stages(uri, parent.info.run_id)["stage1"][name]
    return sorted(points)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[tuple[int, float]]]:
    """What an undisturbed run learns from, in order, and its curve."""
    config, world = settings(tmp_path_factory.mktemp("whole") / "run"), World()
    go(config, world)
    return world.learners[-1].seen, losses(config)


def test_each_step_is_shown_when_its_checkpoint_is_there(tmp_path: Path) -> None:
    config, seen = settings(tmp_path / "run"), []
    store = CheckpointStore(config.out / "checkpoints")

    def look(stage: str, report: StepReport) -> None:
        latest = store.latest()
        seen.append((stage, report.step, latest.step if latest else 0))

    go(config, World(), on_step=look)
    assert seen == [("stage1", step, (step + 1) // 2 * 2) for step in range(STEPS)]  # checkpoint.every=2


DIED = RankDiedError("vlm-learner: rank 1 died during update")
PLACES = {
    "update before any checkpoint": (("update", 2), 0),
    "update": (("update", 4), 2),
    "publish": (("publish", 5), 4),
    "save": (("save", 2), 2),  # the half-written checkpoint is gone, the one before is used
    "export at the end": (("export", 4), 6),
    "start": (("start", 1), 0),
}


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_lost_group_is_replaced_and_the_steps_since_its_checkpoint_repeated(
    tmp_path: Path, whole: tuple[list[str], list[tuple[int, float]]], place: str, staleness: int
) -> None:
    fault, from_step = PLACES[place]
    config, world = settings(tmp_path / "run"), World(faults={fault: DIED})
    text = go(config, world, staleness=staleness)
    assert world.learners[-1].seen == whole[0]
    assert losses(config) == whole[1]
    assert world.calls["start"] == 2
    assert f"a new group goes on from {'step ' + str(from_step) if from_step else 'the start of stage1'}" in text
    assert world.served == sorted(world.served) and len(set(world.served)) == len(world.served)
    if staleness == 0:  # every rollout, also a repeated one, came from weights that had learnt from all steps before it
        assert all(set(counts) == {4 * step} for step, counts in world.asked.items())
    if from_step < STEPS:
        assert losses(config, "learner/restarts")[-1] == (STEPS - 1, 1.0)


def test_restarts_are_bounded_and_the_end_says_how_to_go_on(tmp_path: Path, whole: Any) -> None:
    silent = RankSilentError("vlm-learner: rank 0 did not answer update within 600 s")
    world = World(faults={("update", n): silent for n in (3, 4, 5)})
    config = settings(tmp_path / "run", "learner.max_restarts=1")
    with pytest.raises(
        TrainingError, match=r"max_restarts=1 allows no further.*did not answer.*--resume.* from .*step000002"
    ):
        go(config, world)
    assert world.calls["start"] == 2
    go(settings(tmp_path / "run"), world, resume=True)  # one more death on the way, and another limit
    assert world.learners[-1].seen == whole[0] and losses(config) == whole[1]


def test_without_restarts_and_without_a_checkpoint_the_error_says_so(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "learner.max_restarts=0")
    with pytest.raises(TrainingError, match=r"max_restarts=0.*rank 1 died.*There is no checkpoint yet"):
        go(config, World(faults={("update", 1): DIED}))


def test_any_other_error_is_no_reason_to_restart(tmp_path: Path) -> None:
    world = World(faults={("update", 3): TrainingError("ratio gate")})
    with pytest.raises(TrainingError, match=r"^ratio gate$"):
        go(settings(tmp_path / "run"), world)
    assert world.calls["start"] == 1


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_in_a_rollout_leaves_a_checkpoint_of_that_very_step(
    tmp_path: Path, whole: Any, step: int, staleness: int
) -> None:
    config, world = settings(tmp_path / "run"), World()
    with pytest.raises(RunStopped, match=r"is kept. Go on with: vans train .*config.yaml --resume") as caught:
        go(config, world, staleness=staleness, signal_at=step)
    latest = CheckpointStore(config.out / "checkpoints").latest()
    assert latest is not None and latest.path.name in str(caught.value)
    assert latest.step == step or (
        staleness and latest.step < step
    )  # rollouts run ahead of the step that is learnt from
    assert len(world.learners[-1].seen) == 4 * latest.step
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    parent = client.get_run(latest.state.mlflow_run_ids["parent"])
    assert parent.info.status == "KILLED" == client.get_run(latest.state.mlflow_run_ids["stage1"]).info.status
    go(config, world, staleness=staleness, resume=True)
    assert world.learners[-1].seen == whole[0] and losses(config) == whole[1]
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"


FULL = CheckpointWriteError("vlm-learner: rank 1 could not write: [Errno 28] No space left on device")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, whole: Any) -> None:
    config = settings(tmp_path / "run", "checkpoint.every=1")
    world = World(faults={("save", 2): FULL, ("save", 4): OSError(errno.EIO, "Input/output error")})
    text = go(config, world)
    assert world.learners[-1].seen == whole[0] and losses(config) == whole[1]
    lines = [line for line in text.splitlines() if "could not be written" in line]
    assert len(lines) == 2 and "stage1-step000001 is kept" in lines[0] and "stage1-step000003 is kept" in lines[1]
    assert losses(config, "checkpoint/failed") == [(1, 1.0), (3, 2.0)]
    assert [p.name for p in CheckpointStore(config.out / "checkpoints").paths()] == [
        f"stage1-step00000{n}" for n in (6, 5, 3)
    ]
    assert not [p for p in (config.out / "checkpoints").iterdir() if p.name.startswith(".")]


def test_too_many_failed_checkpoints_in_a_row_stop_the_run(tmp_path: Path, whole: Any) -> None:
    config = settings(tmp_path / "run", "checkpoint.every=1", "checkpoint.max_failures=2")
    world = World(faults={("save", n): FULL for n in (2, 3)})
    with pytest.raises(CheckpointWriteError, match=r"2 in a row.*max_failures=2.*step000001 is kept, and --resume"):
        go(config, world)
    go(config, world, resume=True)
    assert world.learners[-1].seen == whole[0] and losses(config) == whole[1]


def test_the_last_checkpoint_of_a_stage_has_to_be_written(tmp_path: Path) -> None:
    world = World(faults={("save", 3): FULL})
    with pytest.raises(CheckpointWriteError, match=r"last one of its stage.*step000004 is kept"):
        go(settings(tmp_path / "run"), world)


def test_rewards_that_always_fail_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(self: ServedStage, sample: Sample, step: int) -> Group:
        return Group(sample, (), ("component 'x' is nan",))

    monkeypatch.setattr(ServedStage, "group", lost)
    with pytest.raises(
        TrainingError, match=r"(?s)not one trajectory of 5 batches in a row could be had.*component 'x' is nan"
    ):
        go(settings(tmp_path / "run"), World())
