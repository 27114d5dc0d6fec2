"""After each optimizer step of a stage: figures to MLflow, a line to the person, alarms, a checkpoint now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.learner.group import LOST
from cluster.errors import TrainingError
from pipeline.config import RunConfig
from pipeline.run.held_out import HeldOut
from pipeline.run.keep import Keeper
from pipeline.run.recovery import Restarts
from pipeline.stages.alarms import AlarmWatch, alarm_lines, alarm_tags
from pipeline.stages.feed import FeedCursor
from pipeline.stages.loop import Learners, StageStopped, StepReport
from pipeline.stages.table import AnyStage
from pipeline.support.interrupt import StopRequest
from pipeline.support.progress import step_note
from pipeline.tracking.behind import RolloutWriter
from pipeline.tracking.rollouts import step_rollouts

log = logging.getLogger(__name__)

FLUSH_S = 10.0
"""Longest that a checkpoint waits for the figures of its steps to be in the tracking store or in the spool."""

OnStep = Callable[[str, StepReport], None]
"""What whoever started the run wants to see of each step: the stage's name and the report."""


@dataclass
class StepHook:
    """What happens after each step: figures to MLflow, a line to the person, alarms, a checkpoint now and then."""

    config: RunConfig
    keeper: Keeper
    stage: AnyStage
    learners: Learners
    alarms: AlarmWatch
    progress: Any
    restarts: Restarts
    stop: StopRequest = field(default_factory=StopRequest)
    held_out: HeldOut | None = None
    on_step: OnStep | None = None
    rollouts: RolloutWriter | None = None
    ended: FeedCursor | None = None  # where the next stage draws from, if this one ended before its last step
    saved: int = -1  # the step of the last checkpoint
    unsent: int = 0  # uploads to the mirror that have failed
    sent: str = ""  # the newest checkpoint that is whole in the mirror
    lost: int = 0  # steps whose rollouts could not be stored

    async def begin(self, first: int, cursor: FeedCursor) -> None:
        """Evaluate the pair that the stage begins with, and make good what a killed run did not come to."""
        held = self.held_out
        if held is None:
            return
        await asyncio.to_thread(held.export)
        await self.stop.race(self.ask(first))
        if held.is_best(self.stage.name, first):
            await self.save(first, cursor, last=False)

    async def ask(self, step: int) -> None:
        """Evaluate the pair if it is due after ``step`` steps."""
        if self.held_out is not None:
            await self.held_out.ask(self.stage, self.learners, step, self.progress.say)

    def tell_over(self, done: int) -> None:
        """Say that the stage ends because its evaluations found nothing better."""
        assert self.held_out is not None
        best, section = self.held_out.standing.stage_best, self.config.evaluate
        told = (
            f"{self.stage.name} ends after {done} steps: {section.stop_if_not_better} evaluations in a row were not better in "
            f"{section.metric} than step {best.step if best else 'none'} (evaluate.stop_if_not_better)"
        )
        self.progress.say(told)
        self.keeper.tracker.log_tags({"vans.stopped_early": told})

    async def __call__(self, report: StepReport) -> bool:
        """Do all that; returns whether the stage ends here, because it has not got better for long enough."""
        tracker, section, done = self.keeper.tracker, self.config, report.step + 1
        self.progress.advance(step_note(report.metrics))
        watched = self.alarms.see(report.step, report.metrics)
        for line, style in alarm_lines(report.step, watched):
            self.progress.say(line, style)
        if tags := alarm_tags(report.step, watched):
            tracker.log_tags(tags)
        counts = {"alarm/on": float(len(watched.state.on)), "learner/restarts": float(self.restarts.count)}
        tracker.log_metrics({**report.metrics, **counts}, report.step)
        every = section.tracking.clips_every
        if every and report.step % every == 0:
            for clip in (g.members[0].clip for g in report.batch.groups[:2]):
                if clip is not None:
                    tracker.log_clip(clip.frames, clip.caption, report.step, fps=section.video.fps)
        self.store_rollouts(report)
        held = self.held_out
        over = held is not None and held.standing.asked == done and held.over
        last = over or done == self.stage.section.steps or bool(watched.lasting)
        best = held is not None and held.is_best(self.stage.name, done)
        if last or best or (section.checkpoint.every and done % section.checkpoint.every == 0):
            await self.save(done, report.cursor, last=last)
        self.tell_uploads(report.step)
        if watched.lasting:
            raise TrainingError(
                f"{self.stage.name} stopped after {done} steps, because an alarm stood for {section.alarms.stop_after} steps in a "
                f"row (alarms.stop_after): {'; '.join(watched.lasting.values())}. The checkpoint of this step is kept; to go on "
                "all the same, resume with alarms.stop_after=0"
            )
        if over:
            self.ended = report.cursor
            self.tell_over(done)
        if self.on_step is not None:
            self.on_step(self.stage.name, report)
        return over

    async def save(self, done: int, cursor: FeedCursor, *, last: bool) -> None:
        """Write the checkpoint from which step ``done`` is next, or tell why there is none.

        First the figures of the steps before it go to the store or the spool, and their rollouts to the disk: a run that is
        killed afterwards does not repeat those steps, so they would be missing for ever.
        """
        if not await asyncio.to_thread(self.keeper.tracker.flush, FLUSH_S):
            log.warning(
                "the tracking store has not answered for %.0f s; the checkpoint is written all the same", FLUSH_S
            )
        if self.rollouts is not None and not await asyncio.to_thread(self.rollouts.flush, FLUSH_S):
            log.warning("the rollouts are not written after %.0f s; the checkpoint is written all the same", FLUSH_S)
        told = await self.keeper.save(self.stage, self.learners, done, cursor, self.alarms.state, last=last)
        if self.held_out is not None and self.held_out.is_best(self.stage.name, done):
            await asyncio.to_thread(self.held_out.settle, told is None)
        if told is None:
            self.saved = done
            return
        self.progress.say(told, "bold yellow")
        self.keeper.tracker.log_metrics({"checkpoint/failed": float(self.keeper.failures.total)}, done - 1)

    def store_rollouts(self, report: StepReport) -> None:
        """Have the step's rollouts written where they are due, and tell what could not be."""
        section, writer = self.config.tracking.rollouts, self.rollouts
        if writer is None:
            return
        if section.every and report.step % section.every == 0:
            stage = self.stage.section
            writer.put(
                step_rollouts(
                    self.stage.name,
                    report.step,
                    report.batch,
                    clips=section.clips,
                    group_size=stage.rollout.group_size,
                    weights=stage.rewards.weights,
                    figures=report.metrics,
                    fps=self.config.video.fps,
                    run_id=self.keeper.tracker.run_id,
                    experiences={policy: self.stage.experiences(report.batch, policy) for policy in self.stage.policies}
                    if section.replay
                    else None,
                )
            )
        if writer.counts.lost != self.lost:
            self.lost = writer.counts.lost
            self.keeper.tracker.log_metrics({"tracking/rollouts_lost": float(self.lost)}, report.step)
        for line in writer.news():
            self.progress.say(line, "bold yellow")

    def tell_uploads(self, step: int) -> None:
        """Tell what could not be sent to the mirror; raises CheckpointWriteError where that was once too often in a row."""
        tracker, uploads = self.keeper.tracker, self.keeper.uploads
        failed, sent = uploads.total, uploads.newest
        if failed != self.unsent:
            tracker.log_metrics({"checkpoint/mirror_failed": float(failed)}, step)
        if sent != self.sent:
            tracker.log_tags({"checkpoint.mirrored": sent})
        self.unsent, self.sent = failed, sent
        for line in uploads.news():
            self.progress.say(line, "bold yellow")

    async def keep(self, stopped: StageStopped) -> None:
        """Write the checkpoint of a stage that was asked to stop, unless this very step has one."""
        if stopped.step == self.saved:
            return
        try:
            await self.save(stopped.step, stopped.cursor, last=True)
        except LOST as error:  # no time for a new group; the checkpoint before serves
            self.progress.say(f"no checkpoint of step {stopped.step}: {error}", "bold yellow")
