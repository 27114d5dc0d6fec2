"""The loop both stages share: sample, learn, publish.

``max_staleness`` says how many rollout batches may be in flight beside the one being learnt from. With 0 a batch is sampled by
exactly the weights it trains; with more, sampling goes on while the learner works. There is no other difference.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from actors.learner.group import LearnerGroup
from actors.pool.pool import WorkerPool
from actors.records import Experience
from cluster.errors import TrainingError
from pipeline.config.stages import StageSection
from pipeline.fleet.open import Fleet, at_rest
from pipeline.stages.caches import cache_metrics, worker_counts
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.groups import FailureBudget, Group, LeftOut, RolloutBatch, assemble
from pipeline.stages.refill import Refill
from pipeline.stages.speed import Speeds
from pipeline.stages.spending import spend_metrics
from pipeline.stages.step_times import profile
from pipeline.support.interrupt import StopRequest

log = logging.getLogger(__name__)

T = TypeVar("T")


class StageStopped(Exception):
    """A stop was requested: ``step`` is the first step that was not finished, and draws from ``cursor``."""

    def __init__(self, step: int, cursor: FeedCursor) -> None:
        super().__init__(f"stopped before step {step}")
        self.step, self.cursor = step, cursor


class Stage(Protocol):
    """What a stage tells the loop. ``policies`` are the models that it trains; the other one is frozen."""

    name: str
    fleet: Fleet

    @property
    def policies(self) -> tuple[str, ...]: ...
    @property
    def section(self) -> StageSection: ...
    async def draw(
        self, feed: SampleFeed, step: int, count: int, wave: int = 0
    ) -> list[asyncio.Task[Group | None]]: ...
    def lost(self, step: int) -> list[str]: ...
    def passed_over(self, step: int) -> list[LeftOut]: ...
    def experiences(self, batch: RolloutBatch, policy: str) -> list[Experience]: ...
    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]: ...


Learners = Mapping[str, LearnerGroup]
"""The learner group of each policy that a stage trains."""


@dataclass
class StageResult:
    """What a finished stage hands on."""

    policies: tuple[str, ...]
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
Ask = Callable[[int], Awaitable[None]]


async def run_stage(
    stage: Stage,
    feed: SampleFeed,
    learners: Learners,
    *,
    first_step: int = 0,
    on_step: StepHook,
    ask: Ask | None = None,
    stop: StopRequest | None = None,
    speeds: Speeds | None = None,
) -> StageResult:
    """Train ``stage`` from ``first_step`` to its last; ``on_step`` (awaited) tracks, shows and checkpoints, and ends it by True.

    ``ask`` is awaited when a step's weights are served, with the number of steps done: the held-out evaluation. ``speeds`` adds
    how fast samplers and learners work.
    Raises StageStopped where ``stop`` asks for it: rollouts are cancelled, an update is waited for.
    """
    section, stop = stage.section, StopRequest() if stop is None else stop  # one without a request is false
    result = StageResult(stage.policies, section.steps)
    frozen_before = await frozen_hashes(stage, learners)
    flights: deque[asyncio.Task[tuple[RolloutBatch, float]]] = deque()
    cursors: dict[int, FeedCursor] = {}  # where each step in flight began to draw
    drawing = asyncio.Lock()
    budget = FailureBudget(stage.name, section.rollout.max_failed_ratio)
    launched = first_step
    if speeds is not None:
        await speeds.begin(stage.fleet)
    pools, profiled = pool_metrics(stage), time.monotonic()
    try:
        for step in range(first_step, section.steps):
            while launched < section.steps and launched - step <= section.rollout.max_staleness and not stop:
                flights.append(asyncio.create_task(rollout(stage, feed, launched, drawing, cursors, learners, budget)))
                launched += 1
            started = time.monotonic()
            cursor = cursors.get(step, feed.cursor)
            rolled = await stop.race(flights.popleft()) if flights else None
            if rolled is None:
                raise StageStopped(step, cursor)
            batch, rollout_s = rolled
            waited = time.monotonic() - started
            metrics = {
                **batch.metrics,
                **stage.metrics(batch, step),
                "time/rollout_s": rollout_s,
                "time/wait_s": waited,
            }
            metrics |= await learn(stage, learners, batch, speeds)
            metrics |= {"time/step_s": time.monotonic() - started, "data/quarantined": float(len(feed.quarantined))}
            if ask is not None:
                asked = time.monotonic()
                await stop.race(ask(step + 1))
                metrics["time/evaluate_s"] = time.monotonic() - asked
            before, since, pools, profiled = pools, profiled, pool_metrics(stage), time.monotonic()
            overlaps = section.rollout.max_staleness > 0
            metrics |= pools | profile(before, pools, metrics, profiled - since, overlaps=overlaps)
            counts = await worker_counts(stage.fleet)
            metrics |= cache_metrics(stage.fleet, counts)
            if speeds is not None:
                metrics |= await speeds.samplers(stage.fleet, counts, metrics)
            metrics |= await spend_metrics(stage.fleet)
            result.history.append(metrics)
            result.ratio_max_dev = max(result.ratio_max_dev, metrics.get("learner/ratio_max_dev", 0.0))
            if await on_step(StepReport(step, metrics, batch, cursors.get(step + 1, feed.cursor))) is True:
                result.steps = step + 1
                break
        if stop:
            raise StageStopped(result.steps, feed.cursor)
    finally:
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
    result.frozen_ok = frozen_before == await frozen_hashes(stage, learners)
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
    learners: Learners,
    budget: FailureBudget,
) -> tuple[RolloutBatch, float]:
    """Sample the groups of one step; returns the batch and the seconds it took, and notes in ``cursors`` where it drew from."""
    started = time.monotonic()
    section, grpo = stage.section.rollout, stage.section.learning
    async with drawing:  # draws happen in the order of steps, whatever finishes first
        cursors[step] = feed.cursor
        tasks = await stage.draw(feed, step, section.prompts_per_step)
        refill = None
        if section.max_refills:
            refill = await complete(stage, feed, step, await judged(stage, step, tasks, budget), budget)
    groups = refill.groups if refill else await judged(stage, step, tasks, budget)
    batch = assemble(
        groups,
        stage.section.rewards.weights,
        std_norm=grpo.std_norm,
        normalise_rewards=grpo.normalise_rewards,
        min_group=grpo.min_group,
        trained_version=learners[stage.policies[0]].version,
        beside=[*(refill.beside if refill else ()), *stage.passed_over(step)],
    )
    if refill:
        batch.metrics.update(refill.metrics())
    return batch, time.monotonic() - started


async def complete(
    stage: Stage, feed: SampleFeed, step: int, groups: list[Group | None], budget: FailureBudget
) -> Refill:
    """Replace what carries no gradient among a step's ``groups``, wave after wave; the caller holds the drawing lock."""
    grpo, weights = stage.section.learning, stage.section.rewards.weights
    refill = Refill(groups, weights, grpo.normalise_rewards, grpo.min_group, stage.section.rollout.max_refills)
    wave = 0
    while count := refill.missing():
        wave += 1
        refill.add(await judged(stage, step, await stage.draw(feed, step, count, wave), budget))
    return refill


async def judged(
    stage: Stage, step: int, tasks: list[asyncio.Task[Group | None]], budget: FailureBudget
) -> list[Group | None]:
    """Return the groups of ``tasks``. What was lost in them and before them is logged, and too much of it raises TrainingError."""
    groups = await gather(tasks)
    for reason, count in budget.count(groups, stage.lost(step)).items():
        log.warning("%s step %d: %d trajectories lost: %s", budget.stage, step, count, reason)
    return groups


async def gather(tasks: list[asyncio.Task[T]]) -> list[T]:
    """Return the results of ``tasks``; the first that fails ends the others and is raised."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def learn(
    stage: Stage, learners: Learners, batch: RolloutBatch, speeds: Speeds | None = None
) -> dict[str, float]:
    """Update on ``batch`` and publish the new weights; a batch without groups is skipped and counted."""
    if not batch.groups:
        return {"learner/empty_batches": 1.0}
    started = time.monotonic()
    async with at_rest(stage.fleet):
        rested = time.monotonic()
        found = await gather(
            [asyncio.create_task(update_one(stage, policy, learners[policy], batch)) for policy in stage.policies]
        )
    serving = [serve_one(stage, policy, learners[policy], u) for policy, u in zip(stage.policies, found, strict=True)]
    published = await gather([asyncio.create_task(work) for work in serving])
    metrics = {"time/rest_s": rested - started} if stage.fleet.resting else {}
    for policy, update, publish_s in zip(stage.policies, found, published, strict=True):
        prefix = "learner/" if len(found) == 1 else f"learner/{policy}/"
        metrics |= {f"{prefix}{name}": value for name, value in update.figures.items()}
        for name, seconds in (("time/update_s", update.update_s), ("time/publish_s", update.publish_s + publish_s)):
            metrics[name] = max(metrics.get(name, 0.0), seconds)
        if speeds is not None:
            units = update.figures.get("steps", 0.0)
            metrics |= await speeds.learner(
                prefix, policy, learners[policy], update.experiences, units, update.update_s
            )
    if len(found) > 1:
        metrics["learner/ratio_max_dev"] = max(update.figures.get("ratio_max_dev", 0.0) for update in found)
    return metrics


@dataclass(frozen=True)
class Update:
    """What a policy's update has given: the learner's figures, and the new weights where there are any."""

    figures: dict[str, float]
    update_s: float = 0.0
    publish_s: float = 0.0
    payload: list[Any] | None = None
    experiences: int = 0


async def update_one(stage: Stage, policy: str, learner: LearnerGroup, batch: RolloutBatch) -> Update:
    """Update one policy, and have its learner publish what is new."""
    items = stage.experiences(batch, policy)
    if not items:
        return Update({"empty_batches": 1.0})
    started, before, grpo = time.monotonic(), learner.version, stage.section.learning
    figures = await learner.update(items, updates=grpo.updates_per_batch, epochs=grpo.epochs_per_batch)
    updated = time.monotonic()
    payload = None
    if learner.version != before:  # a skipped update leaves nothing to publish
        payload = await learner.publish(receivers=pool_of(stage, policy).receivers())
    return Update(figures, updated - started, time.monotonic() - updated, payload, len(items))


async def serve_one(stage: Stage, policy: str, learner: LearnerGroup, update: Update) -> float:
    """Have the policy's pool serve what ``update`` published; returns the seconds that it took."""
    if update.payload is None:
        return 0.0
    started = time.monotonic()
    await pool_of(stage, policy).set_weights(learner.version, update.payload)
    return time.monotonic() - started


def pool_of(stage: Stage, policy: str) -> WorkerPool:
    """Return the pool that serves ``policy``."""
    pool: WorkerPool = getattr(stage.fleet, policy)
    return pool


async def frozen_hashes(stage: Stage, learners: Learners) -> tuple[frozenset[str], ...]:
    """Return what must not change: the weights of the pools that are not trained, CLIP's included, and the learners' base."""
    frozen = [pool for pool in stage.fleet.pools() if pool.name not in stage.policies]
    pools = [frozenset((await pool.call_all("weights_hash")).values()) for pool in frozen]
    async with at_rest(stage.fleet):
        return (*pools, frozenset([await learner.base_hash() for learner in learners.values()]))


def pool_metrics(stage: Stage) -> dict[str, float]:
    """Return the state of the pools as metrics."""
    metrics: dict[str, float] = {}
    for pool in stage.fleet.pools():
        metrics |= {f"pool/{pool.name}/{name}": value for name, value in pool.stats().metrics().items()}
    return metrics
