"""``vans train``: one run, from the configuration to two tuned models. The order of things, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from actors.learner.group import LearnerGroup
from actors.learner.spec import GrpoSpec, LearnerSpec, OptimSpec
from actors.learner.trainable import LoraSpec
from actors.records import Sample, derive_seed
from cluster.errors import CheckpointError, ConfigError, TrainingError
from pipeline.checkpoint import Checkpoint, CheckpointStore, TrainState, require_same_config
from pipeline.config import RunConfig, to_yaml
from pipeline.config.stages import Stage1Section, Stage2Section
from pipeline.control.monitor import supervised_fleet
from pipeline.evaluate.predictions import Prediction
from pipeline.evaluate.run import answer_with_progress, load_samples, score_systems
from pipeline.evaluate.table import EvaluationTable
from pipeline.fleet import LEARNER, Fleet, cluster_session, placement_plan, serve_trained
from pipeline.models import resolve_adapter, resolve_model
from pipeline.progress import bar, step_note
from pipeline.sources import training_source
from pipeline.stages.alarms import AlarmWatch, alarm_lines, alarm_tags
from pipeline.stages.all_in_one import AllInOne
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.loop import Learners, Stage, StageResult, StepReport, pool_of, run_stage
from pipeline.stages.stage1 import Stage1
from pipeline.stages.stage2 import Stage2
from pipeline.tracking import Tracker
from rewards.alarms import AlarmState

AnyStage = Stage1 | Stage2 | AllInOne
STAGES: dict[str, tuple[type[AnyStage], ...]] = {"two_stage": (Stage1, Stage2), "all_in_one": (AllInOne,)}
SYSTEMS = ("SFT", "Joint-GRPO")


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
    config: RunConfig, *, resume: bool = False, evaluate: bool = False, console: Console | None = None
) -> RunReport:
    """Run both stages of ``config``; with ``evaluate`` the pair answers the held-out samples before and after.

    Raises ConfigError, DataError, CheckpointError or PlacementError before anything is trained, TrainingError later.
    """
    console = console or Console()
    require_trainable(config)
    checkpoint = _starting_point(config, resume)
    source = training_source(config)
    for role in ("vlm", "vdm", "clip"):
        resolve_model(getattr(config.models, role), role)  # type: ignore[arg-type]
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    run_ids = checkpoint.state.mlflow_run_ids if checkpoint else {}
    with cluster_session(config), Tracker.start(config, resume_run_id=run_ids.get("parent")) as tracker:
        tracker.log_dataset(config.data.train, source.digest, source.count)
        run = _Run(config, tracker, console, SampleFeed(source, config.stage1.rollout.prompts_per_step), checkpoint)
        return asyncio.run(run.go(evaluate))


def print_plan(config: RunConfig) -> None:
    """Print the resolved configuration and what it asks of the cluster."""
    console = Console()
    console.print(to_yaml(config), highlight=False, markup=False)
    console.print(placement_plan(config).table(), highlight=False, markup=False)


def _starting_point(config: RunConfig, resume: bool) -> Checkpoint | None:
    store = CheckpointStore(config.out / "checkpoints", config.checkpoint.keep)
    if not resume:
        if store.paths():
            raise ConfigError(
                f"out={config.out} already holds a run; continue it with --resume, or choose another folder (out=…)"
            )
        return None
    checkpoint = store.latest()
    if checkpoint is None:
        raise CheckpointError(f"--resume: there is no checkpoint under {store.root}; start the run without --resume")
    require_same_config(checkpoint.state, config)
    return checkpoint


@dataclass
class _Run:
    """The state of one run while it goes on."""

    config: RunConfig
    tracker: Tracker
    console: Console
    feed: SampleFeed
    checkpoint: Checkpoint | None
    report: RunReport = field(default_factory=RunReport)
    run_ids: dict[str, str] = field(default_factory=dict)

    async def go(self, evaluate: bool) -> RunReport:
        started = time.monotonic()
        self.run_ids = {"parent": self.tracker.run_id}
        self.report.run_id, self.report.tracking_uri = self.tracker.run_id, self.tracker.uri
        state = self.checkpoint.state if self.checkpoint else None
        if state is not None:
            self.feed = SampleFeed(self.feed.source, self.feed.batch_size, FeedCursor.from_json(state.cursor))
            self.run_ids |= state.mlflow_run_ids
        with self.console.status("starting the pools (vLLM engine, artist, scorers)"):
            samples = asyncio.create_task(asyncio.to_thread(load_samples, self.config)) if evaluate else None
            fleet_context = supervised_fleet(self.config)
            fleet = await fleet_context.__aenter__()
        try:
            self.report.wall_s["start"] = round(time.monotonic() - started, 1)
            if samples is not None:
                self.report.samples = await samples
                await self._answer(fleet, SYSTEMS[0])
            for kind in STAGES[self.config.training]:
                await self._stage(kind(self.config, fleet), fleet, state)
            if evaluate:
                await self._answer(fleet, SYSTEMS[1])
                self.report.table = await score_systems(
                    self.config, fleet, self.report.predictions, self.report.samples
                )
                self.tracker.log_evaluation(self.report.table)
        finally:
            self.feed.close()
            await fleet_context.__aexit__(None, None, None)
        return self.report

    async def _answer(self, fleet: Fleet, system: str) -> None:
        started = time.monotonic()
        self.report.predictions[system] = await answer_with_progress(
            self.config, fleet, self.report.samples, self.console, f"held out · {system}"
        )
        self.report.wall_s["evaluate"] = round(self.report.wall_s.get("evaluate", 0.0) + time.monotonic() - started, 1)

    async def _stage(self, stage: AnyStage, fleet: Fleet, state: TrainState | None) -> None:
        """Train one stage, or load what it made before the run was interrupted."""
        if stage.section.steps == 0:
            return
        exports = {policy: self.config.out / export_name(self.config, policy) for policy in stage.policies}
        names = [kind.name for kind in STAGES[self.config.training]]
        if state is not None and names.index(stage.name) < names.index(state.stage):
            for policy, folder in exports.items():
                await serve_trained(pool_of(stage, policy), folder, version=state.extra["versions"][policy])
            return
        started = time.monotonic()
        here = state if state is not None and state.stage == stage.name else None
        alarms = AlarmWatch(self.config.alarms.settings, tuple(stage.section.rewards.weights))
        async with self._learners(stage, fleet) as learners:
            if here is not None:
                assert self.checkpoint is not None
                stage.restore(here.window)
                alarms.state = AlarmState.from_json(here.extra["alarms"])
                for policy, learner in learners.items():
                    await learner.restore(str(self.checkpoint.path / f"{policy}_learner"))
                    await pool_of(stage, policy).set_weights(learner.version, await learner.publish())
            with self.tracker.stage(stage.name, resume_run_id=self.run_ids.get(stage.name)) as run_id:
                self.run_ids[stage.name] = run_id
                first = here.step if here else 0
                with bar(self.console, stage.title, stage.section.steps, first) as progress:
                    hook = _StepHook(self, stage, learners, alarms, progress)
                    result = await run_stage(stage, self.feed, learners, first_step=first, on_step=hook)
                for policy, folder in exports.items():
                    await learners[policy].export(str(folder))
                    self.tracker.log_checkpoint(folder)
            await serve_averages(stage, learners)
        self.report.stages[stage.name] = result
        self.report.wall_s[stage.name] = round(time.monotonic() - started, 1)

    async def save(
        self, stage: AnyStage, learners: Learners, step: int, cursor: FeedCursor, alarms: AlarmState
    ) -> None:
        """Write a checkpoint from which ``step`` is the next step."""
        store = CheckpointStore(self.config.out / "checkpoints", self.config.checkpoint.keep)
        trained = {policy: learner.version for policy, learner in learners.items()}
        state = TrainState.of(
            self.config,
            stage.name,
            step,
            cursor=cursor.to_json(),
            window=stage.state(),
            mlflow_run_ids=dict(self.run_ids),
            extra={
                "versions": {pool.name: pool.stats().version for pool in stage.fleet.pools()} | trained,
                "alarms": alarms.to_json(),
            },
        )
        with store.write(stage.name, step, state) as folder:
            for policy, learner in learners.items():
                await learner.save(str(folder / f"{policy}_learner"))
                await learner.export(str(folder / export_name(self.config, policy)))
        self.tracker.log_checkpoint(store.root / f"{stage.name}-step{step:06d}")

    @asynccontextmanager
    async def _learners(self, stage: AnyStage, fleet: Fleet) -> AsyncIterator[Learners]:
        """Start a learner group for each policy that ``stage`` trains, and end them with the block."""
        group, ranks = fleet.placement.group(LEARNER), self.config.learner.ranks
        learners = {
            policy: LearnerGroup(
                learner_spec(self.config, stage, policy), group, range(i * ranks, (i + 1) * ranks) if group else None
            )
            for i, policy in enumerate(stage.policies)
        }
        try:
            with self.console.status(f"starting the {' and the '.join(learners)} learner ({ranks} ranks)"):
                await asyncio.gather(*(learner.start() for learner in learners.values()))
            yield learners
        finally:
            await asyncio.gather(*(learner.close() for learner in learners.values()))


@dataclass
class _StepHook:
    """What happens after each step: figures to MLflow, a line to the person, alarms, a checkpoint now and then."""

    run: _Run
    stage: AnyStage
    learners: Learners
    alarms: AlarmWatch
    progress: Any

    async def __call__(self, report: StepReport) -> None:
        run, section, done = self.run, self.run.config, report.step + 1
        self.progress.advance(step_note(report.metrics))
        watched = self.alarms.see(report.step, report.metrics)
        for line, style in alarm_lines(report.step, watched):
            self.progress.say(line, style)
        if tags := alarm_tags(report.step, watched):
            run.tracker.log_tags(tags)
        run.tracker.log_metrics({**report.metrics, "alarm/on": float(len(watched.state.on))}, report.step)
        every = section.tracking.clips_every
        if every and report.step % every == 0:
            for clip in (g.members[0].clip for g in report.batch.groups[:2]):
                if clip is not None:
                    run.tracker.log_clip(clip.frames, clip.caption, report.step, fps=section.video.fps)
        last = done == self.stage.section.steps or bool(watched.lasting)
        if last or (section.checkpoint.every and done % section.checkpoint.every == 0):
            await run.save(self.stage, self.learners, done, report.cursor, self.alarms.state)
        if watched.lasting:
            raise TrainingError(
                f"{self.stage.name} stopped after {done} steps, because an alarm stood for {section.alarms.stop_after} steps in a "
                f"row (alarms.stop_after): {'; '.join(watched.lasting.values())}. The checkpoint of this step is kept; to go on "
                "all the same, resume with alarms.stop_after=0"
            )


async def serve_averages(stage: Stage, learners: Learners) -> None:
    """Serve the moving average of each policy whose learner keeps one: it is the stage's result, which what comes next asks."""
    for policy, learner in learners.items():
        if learner.spec.optim.ema:
            await pool_of(stage, policy).set_weights(learner.version + 1, await learner.publish(averaged=True))


def section_of(config: RunConfig, policy: str) -> Stage1Section | Stage2Section:
    """Return the section of the stage that is ``policy``'s own; in all-in-one too it says how the policy learns."""
    return config.stage1 if policy == "vlm" else config.stage2


def export_name(config: RunConfig, policy: str) -> str:
    """Return what the trained ``policy`` is called in a run's folder: an adapter is no model, and the other way round."""
    return f"{policy}_adapter" if section_of(config, policy).lora.rank else f"{policy}_model"


def require_trainable(config: RunConfig) -> None:
    """Raise ConfigError where a model that starts from an adapter is to be trained as full weights."""
    for stage in STAGES[config.training]:
        for policy in stage.policies:
            steps = config.stage2.steps if stage is Stage2 else config.stage1.steps
            adapter = getattr(config.models, f"{policy}_adapter")
            if steps and adapter is not None and section_of(config, policy).lora.rank == 0:
                key = "stage1" if policy == "vlm" else "stage2"
                raise ConfigError(
                    f"models.{policy}_adapter={adapter!r} with {key}.lora.rank=0: full weights cannot be trained through an "
                    f"adapter; set {key}.lora.rank to the adapter's, or start from a whole model (models.{policy})"
                )


def learner_spec(config: RunConfig, stage: AnyStage, policy: str) -> LearnerSpec:
    """Return the learner group that ``stage`` trains ``policy`` with, as the policy's own stage says."""
    learner, models = config.learner, config.models
    section = section_of(config, policy)
    grpo = {
        f.name: getattr(section.grpo, f.name) for f in dataclasses.fields(GrpoSpec) if hasattr(section.grpo, f.name)
    }
    lora = section.lora
    longest = section.text.max_tokens if isinstance(section, Stage1Section) else section.sde.window_size
    seed = derive_seed(config.seed, stage.name, policy, "learner")
    options: dict[str, Any] = (
        {"temperature": section.text.temperature} if policy == "vlm" else {"shift": models.flow_shift}
    )
    return LearnerSpec(
        kind=policy,
        model_path=resolve_model(getattr(models, policy), policy),  # type: ignore[arg-type]
        adapter_path=resolve_adapter(getattr(models, f"{policy}_adapter"), policy),  # type: ignore[arg-type]
        lora=LoraSpec(lora.rank, lora.alpha, tuple(lora.targets) if lora.targets else None, seed=seed % 2**31)
        if lora.rank
        else None,
        ranks=learner.ranks,
        cpus=learner.cpus,
        gpus=learner.gpus,
        dtype=learner.dtype,
        micro_batch=learner.micro_batch,
        activation_checkpointing=learner.activation_checkpointing,
        grpo=GrpoSpec(**grpo, constant_length=longest),
        optim=OptimSpec(**section.optim.model_dump()),
        policy_kwargs=options,
        seed=seed % 2**31,
        start_timeout_s=learner.start_timeout_s,
        step_timeout_s=learner.step_timeout_s,
        name=f"{policy}-learner",
        total_steps=stage.section.steps * stage.section.grpo.updates_per_batch * stage.section.grpo.epochs_per_batch,
    )
