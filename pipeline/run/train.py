"""``vans train``: one run, from the configuration to two tuned models. The order of things, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from actors.records import Sample
from pipeline.checkpoint import (
    Checkpoint,
    CheckpointStore,
    Inputs,
    Mirror,
    TrainState,
    Uploads,
    uploads_to,
)
from pipeline.config import RunConfig, to_yaml
from pipeline.control.monitor import supervised_fleet
from pipeline.data.source import SampleSource
from pipeline.evaluate.evaluation import answer_with_progress, load_samples, score_systems
from pipeline.evaluate.predictions import Prediction
from pipeline.evaluate.table import EvaluationTable
from pipeline.fleet.open import Fleet, at_rest, cluster_session, serve_trained
from pipeline.lock import hold_all
from pipeline.lock.holding import QUEUED_WAIT_S
from pipeline.report.page import write_page
from pipeline.run.after_step import FLUSH_S, OnStep, StepHook
from pipeline.run.best import BEST, standing_of
from pipeline.run.held_out import HeldOut, held_out_source
from pipeline.run.keep import Keeper
from pipeline.run.learners import OpenLearners, export_name, learners_open, serve_averages
from pipeline.run.recovery import Restarts, serve_restarted, train_with_restarts
from pipeline.run.start import (
    beginning,
    cursor_of,
    has_checkpoint,
    mirror_of,
    require_trainable,
    resume_command,
    stopped_message,
)
from pipeline.stages.alarms import AlarmWatch
from pipeline.stages.feed import SampleFeed
from pipeline.stages.loop import StageResult, StageStopped, pool_of, run_stage
from pipeline.stages.speed import Speeds
from pipeline.stages.stage2 import window_warnings
from pipeline.stages.table import STAGES, AnyStage
from pipeline.support import terminal
from pipeline.support.interrupt import StopRequest, stop_on_signals
from pipeline.support.location import Uri
from pipeline.support.progress import bar, waiting
from pipeline.tracking import Tracker, has_store
from pipeline.tracking.behind import RolloutWriter
from pipeline.tracking.rollouts import clear
from rewards.alarms import AlarmState

log = logging.getLogger(__name__)

FEED_CLOSE_S = 30.0
PAGE, PAGE_BYTES = "report/index.html", 32 << 20
"""The artifact that the run's page is, and how large its clips may be together."""
SYSTEMS = ("SFT", "Joint-GRPO")
Resume = bool | Literal["if_any"]


@dataclass
class RunReport:
    """What a run leaves behind for whoever called it."""

    stages: dict[str, StageResult] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    table: EvaluationTable | None = None
    samples: list[Sample] = field(default_factory=list)
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)
    run_id: str = ""
    tracking_uri: str = ""


def run_training(
    config: RunConfig,
    *,
    resume: Resume = False,
    restart_data: bool = False,
    evaluate: bool = False,
    console: Console | None = None,
    on_step: OnStep | None = None,
) -> RunReport:
    """Run both stages of ``config``; with ``evaluate`` the pair answers the held-out samples before and after.

    ``on_step`` is called with the stage's name and the report of each optimizer step, when all else that follows the step is done:
    its figures are on their way to MLflow, its checkpoint is written. An error that it raises ends the run.

    ``resume="if_any"`` continues where there is a checkpoint and else starts; where another process has the folder, it waits for
    that one's end, QUEUED_WAIT_S at most, because it may be writing its last checkpoint. ``restart_data``: a resumed run whose
    training data are not those of its checkpoint begins these data anew.

    Raises ConfigError, InUseError, DataError, StorageError, CheckpointError or PlacementError before anything is trained,
    TrainingError, CheckpointWriteError or LockLostError later; RunStopped where SIGINT or SIGTERM ends it, after a checkpoint
    where a stage was being trained.
    """
    console = console or terminal.console()
    require_trainable(config)
    for warning in window_warnings(config):
        console.print(warning, style="bold yellow", markup=False, highlight=False, soft_wrap=True)
    mirror = mirror_of(config)
    places: dict[str, Path | Uri] = {f"out={config.out}": config.out}
    if mirror is not None:
        places[f"checkpoint.mirror={mirror.root}"] = mirror.root

    def tell(line: str) -> None:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with (
        stop_on_signals(lambda stop: stopped_message(config, stop)) as stop,
        hold_all(places, "vans train", wait_s=QUEUED_WAIT_S if resume == "if_any" else 0.0, tell=tell) as require_owned,
    ):
        return _run_held(config, mirror, resume, restart_data, evaluate, console, stop, require_owned, on_step)


def _run_held(
    config: RunConfig,
    mirror: Mirror | None,
    resume: Resume,
    restart_data: bool,
    evaluate: bool,
    console: Console,
    stop: StopRequest,
    require_owned: Callable[[], None],
    on_step: OnStep | None,
) -> RunReport:
    """Run ``config`` in a folder that is this process's own."""
    going_on = has_checkpoint(config) if resume == "if_any" else bool(resume)
    start = beginning(config, going_on, restart_data, mirror)
    checkpoint, source, inputs = start.checkpoint, start.source, start.inputs
    for line in start.told:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    config.out.mkdir(parents=True, exist_ok=True)
    terminal.keep_log_in(config.out)
    if checkpoint is None:
        clear(config.out)
    (config.out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    if mirror is not None:
        mirror.describe(to_yaml(config))
    run_ids = checkpoint.state.mlflow_run_ids if checkpoint else {}
    if run_ids and not has_store(config.out, config.tracking):  # it stayed in the folder of another machine
        console.print("this machine has not the MLflow store of the run: its curves begin anew", style="yellow")
        run_ids = {}
    with (
        cluster_session(config),
        Tracker.start(config, resume_run_id=run_ids.get("parent")) as tracker,
        uploads_to(
            mirror, config.checkpoint.max_failures, config.checkpoint.mirror_timeout_s, console, require_owned
        ) as uploads,
    ):
        tracker.log_dataset(config.data.train, source.digest, source.count)
        if inputs.restarts:
            tracker.log_tags({"vans.data_restarts": "\n".join(inputs.restarts)})
        held_source = held_out_source(config, tracker)
        feed = SampleFeed(source, batch_size=1)
        run = Run(
            config,
            tracker,
            console,
            feed,
            checkpoint,
            stop=stop,
            uploads=uploads,
            inputs=inputs,
            require_owned=require_owned,
            held_source=held_source,
            on_step=on_step,
        )
        try:
            return stop.run(run.go(evaluate))
        except KeyboardInterrupt:
            tracker.log_tags({"vans.stopped": stop.name})
            raise
        finally:
            run.rollouts.close()


@dataclass
class Run:
    """The state of one run while it goes on."""

    config: RunConfig
    tracker: Tracker
    console: Console
    feed: SampleFeed
    checkpoint: Checkpoint | None
    report: RunReport = field(default_factory=RunReport)
    run_ids: dict[str, str] = field(default_factory=dict)
    stop: StopRequest = field(default_factory=StopRequest)
    uploads: Uploads = field(default_factory=Uploads)
    inputs: Inputs = field(default_factory=Inputs)
    require_owned: Callable[[], None] = lambda: None  # raises where another process has taken the run's folder over
    held_source: SampleSource | None = None
    on_step: OnStep | None = None
    open_learners: OpenLearners = learners_open

    def __post_init__(self) -> None:
        root = self.config.out / "checkpoints"
        self.store = CheckpointStore(root, self.config.checkpoint.keep, self.uploads.in_use, self.require_owned)
        self.held_out = HeldOut(
            self.config, self.tracker, self.store, self.uploads, self.held_source, self.require_owned
        )
        self.speeds = Speeds(self.config)
        self.rollouts = RolloutWriter(self.config.out, self.config.tracking.rollouts.keep_steps, self.require_owned)
        self.keeper = Keeper(
            self.config, self.store, self.tracker, self.uploads, self.inputs, self.held_out, self.run_ids
        )

    async def go(self, evaluate: bool) -> RunReport:
        started = time.monotonic()
        self.run_ids["parent"] = self.tracker.run_id
        self.report.run_id, self.report.tracking_uri = self.tracker.run_id, self.tracker.uri
        state = self.checkpoint.state if self.checkpoint else None
        if state is not None:
            self.feed = SampleFeed(self.feed.source, self.feed.batch_size, cursor_of(state, self.inputs))
            if state.mlflow_run_ids.get("parent") == self.tracker.run_id:
                self.run_ids.update(state.mlflow_run_ids)
            self.offer_earlier(state)
        if told := self.held_out.take_up(standing_of(state)):
            self.console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
        with waiting(self.console, "starting the pools (vLLM engine, artist, scorers)"):
            samples = asyncio.create_task(asyncio.to_thread(load_samples, self.config)) if evaluate else None
            fleet_context = supervised_fleet(self.config)
            fleet = await fleet_context.__aenter__()
        try:
            self.report.wall_s["start"] = round(time.monotonic() - started, 1)
            await self.held_out.load()
            if samples is not None:
                self.report.samples = await samples
                await self._answer(fleet, SYSTEMS[0])
            for kind in STAGES[self.config.training]:
                await self.stage(kind, fleet, state)
            if evaluate:
                await self._answer(fleet, SYSTEMS[1])
                self.report.table = await score_systems(
                    self.config, fleet, self.report.predictions, self.report.samples
                )
                self.tracker.log_evaluation(self.report.table)
        finally:
            try:  # a decoder that never answers must not keep the pools
                await asyncio.wait_for(asyncio.to_thread(self.feed.close), FEED_CLOSE_S)
            except TimeoutError:
                self.console.print(f"the data stream did not end within {FEED_CLOSE_S:g} s", style="yellow")
            finally:
                await fleet_context.__aexit__(None, None, None)
        return self.report

    def offer_earlier(self, state: TrainState) -> None:
        """Send what a run that is continued may not have sent; what the mirror has already is not sent again."""
        assert self.checkpoint is not None
        kinds = STAGES[self.config.training]
        for kind in kinds[: [each.name for each in kinds].index(state.stage)]:
            for policy in kind.policies:
                if (folder := self.config.out / export_name(self.config, policy)).is_dir():
                    self.uploads.offer_export(folder)
        if (best := self.config.out / BEST).is_dir():
            self.uploads.offer_export(best)
        self.uploads.offer(self.checkpoint.path)

    async def _answer(self, fleet: Fleet, system: str) -> None:
        started = time.monotonic()
        self.report.predictions[system] = await answer_with_progress(
            self.config, fleet, self.report.samples, self.console, f"held out · {system}"
        )
        self.report.wall_s["evaluate"] = round(self.report.wall_s.get("evaluate", 0.0) + time.monotonic() - started, 1)

    async def stage(self, kind: type[AnyStage], fleet: Fleet, state: TrainState | None) -> None:
        """Train one stage, or load what it made before the run was interrupted."""
        stage = kind(self.config, fleet)
        if stage.section.steps == 0:
            return
        names = [each.name for each in STAGES[self.config.training]]
        if state is not None and names.index(stage.name) < names.index(state.stage):
            for policy in stage.policies:
                folder, version = self.config.out / export_name(self.config, policy), state.extra["versions"][policy]
                await serve_trained(pool_of(stage, policy), folder, version=version)
            return
        started, began = time.monotonic(), self.feed.cursor
        first = self.checkpoint if state is not None and state.stage == stage.name else None
        standing = self.held_out.standing.next_stage()
        restarts = Restarts(stage.name, self.config.learner.max_restarts, resume_command(self.config))

        async def attempt(here: Checkpoint | None) -> StageResult:
            self.held_out.take_up(standing_of(here.state) if here else standing)
            return await self._attempt(kind(self.config, fleet), fleet, here, restarts)

        async def on_restart(told: str, here: Checkpoint | None) -> None:
            if self.stop:  # no new group for a run that is to end; the checkpoint before serves
                raise asyncio.CancelledError
            self.console.print(
                f"{stage.name}: {told}", style="bold yellow", markup=False, highlight=False, soft_wrap=True
            )
            self.tracker.log_tags({"vans.restart": f"{restarts.count}: {told}"})
            self.tracker.replay()
            await asyncio.to_thread(self.feed.close)
            self.feed = self.feed.at(cursor_of(here.state, self.inputs) if here else began)

        with self.tracker.stage(stage.name, resume_run_id=self.run_ids.get(stage.name)) as run_id:
            self.run_ids[stage.name] = run_id
            result = await train_with_restarts(
                attempt, first, restarts, lambda: self.store.latest(stage.name), on_restart
            )
        await self.log_page()
        self.report.stages[stage.name] = result
        self.report.wall_s[stage.name] = round(time.monotonic() - started, 1)

    async def log_page(self) -> None:
        """Have the run's page, with the newest rollouts, logged as an artifact of the job; what it shows is waited for shortly."""
        await asyncio.gather(
            asyncio.to_thread(self.tracker.flush, FLUSH_S), asyncio.to_thread(self.rollouts.flush, FLUSH_S)
        )
        self.tracker.log_file(
            lambda path: write_page(self.config.out, path.parent, single=True, most_bytes=PAGE_BYTES), PAGE
        )

    async def _attempt(self, stage: AnyStage, fleet: Fleet, here: Checkpoint | None, restarts: Restarts) -> StageResult:
        """Train ``stage`` with new learner groups from ``here`` (None: its beginning) to its end, and export the result."""
        state = here.state if here else None
        first = state.step if state else 0
        alarms = AlarmWatch(self.config.alarms, tuple(stage.section.rewards.weights))
        async with self.open_learners(self.config, stage, fleet, self.console) as learners:
            if here is not None and state is not None:
                alarms.state = AlarmState.from_json(state.extra["alarms"])
                async with at_rest(fleet):
                    for policy, learner in learners.items():
                        await learner.restore(str(here.path / f"{policy}_learner"))
                for policy, learner in learners.items():
                    if not restarts.count:
                        await pool_of(stage, policy).set_weights(learner.version, await learner.publish())
            if restarts.count:
                await serve_restarted(stage, learners, restored=here is not None)
            with bar(self.console, stage.title, stage.section.steps, first) as progress, self.stop.deferred():
                held = self.held_out
                hook = StepHook(
                    self.config,
                    self.keeper,
                    stage,
                    learners,
                    alarms,
                    progress,
                    restarts,
                    self.stop,
                    held,
                    self.on_step,
                    self.rollouts,
                )
                try:
                    await hook.begin(first, self.feed.cursor)
                    if held.over:
                        hook.tell_over(first)
                        result = StageResult(stage.policies, first)
                    else:
                        ask = hook.ask if held.source is not None else None
                        result = await run_stage(
                            stage,
                            self.feed,
                            learners,
                            first_step=first,
                            on_step=hook,
                            ask=ask,
                            stop=self.stop,
                            speeds=self.speeds,
                        )
                    if self.stop:  # asked for while the frozen models were compared
                        raise StageStopped(result.steps, self.feed.cursor)
                except StageStopped as stopped:
                    await hook.keep(stopped)
                    raise asyncio.CancelledError from None
            if hook.ended is not None and hook.ended != self.feed.cursor:  # rollouts of steps that never came had drawn
                await asyncio.to_thread(self.feed.close)
                self.feed = self.feed.at(hook.ended)
            for policy in stage.policies:
                folder = self.config.out / export_name(self.config, policy)
                self.require_owned()
                async with at_rest(fleet):
                    await learners[policy].export(str(folder))
                self.tracker.log_checkpoint(folder)
                self.uploads.offer_export(folder)
            await serve_averages(stage, learners)
        return result
