"""The loop both stages share: sample, learn, publish.

``max_staleness`` says how many rollout batches may be in flight beside the one being learnt from. With 0 a batch is sampled by
exactly the weights it trains; with more, sampling goes on while the learner works. There is no other difference.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.learner.group import LearnerGroup
from actors.pool import WorkerPool
from actors.records import Experience
from cluster.errors import TrainingError
from pipeline.config.schema import StageSection
from pipeline.fleet import Fleet
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.groups import Group, RolloutBatch, assemble
from pipeline.stages.refill import Refill


class Stage(Protocol):
    """What a stage tells the loop."""

    name: str
    policy: str
    fleet: Fleet

    @property
    def section(self) -> StageSection: ...
    @property
    def trained_pool(self) -> WorkerPool: ...
    @property
    def frozen_pool(self) -> WorkerPool: ...
    async def draw(
        self, feed: SampleFeed, step: int, count: int, wave: int = 0
    ) -> list[asyncio.Task[Group | None]]: ...
    def experiences(self, batch: RolloutBatch) -> list[Experience]: ...
    def metrics(self, batch: RolloutBatch) -> dict[str, float]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def after_update(self, step: int) -> None: ...


@dataclass
class StageResult:
    """What a finished stage hands on."""

    policy: str
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    ratio_max_dev: float = 0.0
    frozen_ok: bool = True

    def summary(self, edge: int = 5) -> dict[str, Any]:
        """Return steps, and the mean reward of the first and of the last ``edge`` steps of this process."""
        rewards = [m["reward/total_mean"] for m in self.history if "reward/total_mean" in m]
        first, last = rewards[:edge], rewards[-edge:]
        return {
            "steps": self.steps,
            "reward_first": sum(first) / len(first) if first else None,
            "reward_last": sum(last) / len(last) if last else None,
        }


@dataclass(frozen=True)
class StepReport:
    """One finished step, as hooks see it: its metrics, the batch, and the cursor from which the next step draws."""

    step: int
    metrics: dict[str, float]
    batch: RolloutBatch
    cursor: FeedCursor


StepHook = Callable[[StepReport], Any]


async def run_stage(
    stage: Stage, feed: SampleFeed, learner: LearnerGroup, *, first_step: int = 0, on_step: StepHook
) -> StageResult:
    """Train ``stage`` from ``first_step`` to its last; ``on_step`` (awaited) tracks, shows and checkpoints."""
    section = stage.section
    result = StageResult(stage.policy, section.steps)
    frozen_before = await frozen_hashes(stage, learner)
    flights: deque[asyncio.Task[tuple[RolloutBatch, float]]] = deque()
    cursors: dict[int, FeedCursor] = {}  # where each step in flight began to draw
    drawing = asyncio.Lock()
    launched = first_step
    try:
        for step in range(first_step, section.steps):
            while launched < section.steps and launched - step <= section.rollout.max_staleness:
                flights.append(asyncio.create_task(rollout(stage, feed, launched, drawing, cursors, learner)))
                launched += 1
            started = time.monotonic()
            batch, rollout_s = await flights.popleft()
            waited = time.monotonic() - started
            metrics = {**batch.metrics, **stage.metrics(batch), "time/rollout_s": rollout_s, "time/wait_s": waited}
            metrics |= await learn(stage, learner, batch)
            stage.after_update(step)
            metrics |= {"time/step_s": time.monotonic() - started, "data/quarantined": float(len(feed.quarantined))}
            metrics |= pool_metrics(stage)
            result.history.append(metrics)
            result.ratio_max_dev = max(result.ratio_max_dev, metrics.get("learner/ratio_max_dev", 0.0))
            await on_step(StepReport(step, metrics, batch, cursors.get(step + 1, feed.cursor)))
    finally:
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
    result.frozen_ok = frozen_before == await frozen_hashes(stage, learner)
    if not result.frozen_ok:
        raise TrainingError(
            f"{stage.name}: the frozen model changed while the other was trained; this is a bug, its results are void"
        )
    return result


async def rollout(
    stage: Stage,
    feed: SampleFeed,
    step: int,
    drawing: asyncio.Lock,
    cursors: dict[int, FeedCursor],
    learner: LearnerGroup,
) -> tuple[RolloutBatch, float]:
    """Sample the groups of one step; returns the batch and the seconds it took, and notes in ``cursors`` where it drew from."""
    started = time.monotonic()
    section, grpo = stage.section.rollout, stage.section.grpo
    async with drawing:  # draws happen in the order of steps, whatever finishes first
        cursors[step] = feed.cursor
        tasks = await stage.draw(feed, step, section.prompts_per_step)
        refill = await complete(stage, feed, step, await gather(tasks)) if section.max_refills else None
    groups = refill.groups if refill else await gather(tasks)
    batch = assemble(
        groups,
        stage.section.rewards.weights,
        std_norm=grpo.std_norm,
        normalise_rewards=grpo.normalise_rewards,
        min_group=grpo.min_group,
        trained_version=learner.version,
    )
    if refill:
        batch.metrics.update(refill.metrics())
    return batch, time.monotonic() - started


async def complete(stage: Stage, feed: SampleFeed, step: int, groups: list[Group | None]) -> Refill:
    """Replace what carries no gradient among a step's ``groups``, wave after wave; the caller holds the drawing lock."""
    grpo, weights = stage.section.grpo, stage.section.rewards.weights
    refill = Refill(groups, weights, grpo.normalise_rewards, grpo.min_group, stage.section.rollout.max_refills)
    wave = 0
    while count := refill.missing():
        wave += 1
        refill.add(await gather(await stage.draw(feed, step, count, wave)))
    return refill


async def gather(tasks: list[asyncio.Task[Group | None]]) -> list[Group | None]:
    """Return the groups of ``tasks``; the first that fails ends the others and is raised."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def learn(stage: Stage, learner: LearnerGroup, batch: RolloutBatch) -> dict[str, float]:
    """Update on ``batch`` and publish the new weights; a batch without groups is skipped and counted."""
    if not batch.groups:
        return {"learner/empty_batches": 1.0}
    started, before, grpo = time.monotonic(), learner.version, stage.section.grpo
    metrics = await learner.update(
        stage.experiences(batch), updates=grpo.updates_per_batch, epochs=grpo.epochs_per_batch
    )
    updated = time.monotonic()
    if learner.version != before:  # a skipped update leaves nothing to publish
        await stage.trained_pool.set_weights(learner.version, await learner.publish())
    return {
        **{f"learner/{name}": value for name, value in metrics.items()},
        "time/update_s": updated - started,
        "time/publish_s": time.monotonic() - updated,
    }


async def frozen_hashes(stage: Stage, learner: LearnerGroup) -> tuple[frozenset[str], str]:
    """Return what must not change: the frozen pool's weights and the learner's base weights."""
    hashes = await stage.frozen_pool.call_all("weights_hash")
    return frozenset(hashes.values()), await learner.base_hash()


def pool_metrics(stage: Stage) -> dict[str, float]:
    """Return the state of the pools as metrics."""
    metrics: dict[str, float] = {}
    for pool in stage.fleet.pools():
        metrics |= {f"pool/{pool.name}/{name}": value for name, value in pool.stats().metrics().items()}
    return metrics
