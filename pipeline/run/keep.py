"""A run's checkpoints: what one holds, and what becomes of one that cannot be written. When one is written is ``after_step``'s."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.checkpoint import CheckpointStore, Inputs, TrainState, Uploads, WriteFailures
from pipeline.config import RunConfig
from pipeline.fleet.open import at_rest
from pipeline.run.held_out import HeldOut
from pipeline.run.learners import export_name
from pipeline.stages.feed import FeedCursor
from pipeline.stages.loop import Learners
from pipeline.stages.table import AnyStage
from pipeline.tracking import Tracker
from rewards.alarms import AlarmState


@dataclass
class Keeper:
    """Writes the checkpoints of one run into ``store`` and offers them to its mirror."""

    config: RunConfig
    store: CheckpointStore
    tracker: Tracker
    uploads: Uploads
    inputs: Inputs
    held_out: HeldOut
    run_ids: dict[str, str] = field(default_factory=dict)
    """MLflow's runs: the parent's and each stage's, as they come to be known."""

    def __post_init__(self) -> None:
        self.failures = WriteFailures(self.store, self.config.checkpoint.max_failures)

    async def save(
        self, stage: AnyStage, learners: Learners, step: int, cursor: FeedCursor, alarms: AlarmState, *, last: bool
    ) -> str | None:
        """Write a checkpoint from which ``step`` is the next step; returns a warning where the run goes on without it.

        Raises CheckpointWriteError where it does not: the ``last`` of a stage, or one too many in a row.
        """
        what = f"{stage.name} after {step} steps"
        told = await self.failures.attempt(self._write(stage, learners, step, cursor, alarms), what, last=last)
        if told is None:
            path = self.store.root / f"{stage.name}-step{step:06d}"
            self.tracker.log_checkpoint(path)
            self.uploads.offer(path)
        return told

    async def _write(
        self, stage: AnyStage, learners: Learners, step: int, cursor: FeedCursor, alarms: AlarmState
    ) -> None:
        trained = {policy: learner.version for policy, learner in learners.items()}
        state = TrainState.of(
            self.config,
            stage.name,
            step,
            cursor=cursor.to_json(),
            mlflow_run_ids=dict(self.run_ids),
            inputs=self.inputs.to_json(),
            extra={
                "versions": {pool.name: pool.stats().version for pool in stage.fleet.pools()} | trained,
                "alarms": alarms.to_json(),
            }
            | self.held_out.remembered(),
        )
        with self.store.write(stage.name, step, state) as folder:
            async with at_rest(stage.fleet):
                for policy, learner in learners.items():
                    await learner.save(str(folder / f"{policy}_learner"))
                    await learner.export(str(folder / export_name(self.config, policy)))
