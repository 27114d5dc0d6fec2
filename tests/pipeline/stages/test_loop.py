"""The loop both stages share: order, staleness bound, cursors, the frozen proof, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from actors.records import Sample, Scores
from cluster.errors import TrainingError
from pipeline.config import RunConfig
from pipeline.config.stages import RolloutSection, Stage1Section
from pipeline.data.source import Cursor
from pipeline.stages.feed import SampleFeed
from pipeline.stages.groups import Group, LeftOut, Member, RolloutBatch
from pipeline.stages.loop import StepReport, run_stage
from tests.pipeline.stages.test_feed import Numbers

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)


@dataclass
class Pool:
    """A pool that holds a weights version and an unchanging model."""

    name: str
    version: int = 0
    hashes: list[str] = field(default_factory=lambda: ["frozen"])

    async def set_weights(self, version: int, payload: Any) -> None:
        await asyncio.sleep(0.001)
        self.version = version

    def receivers(self) -> int:
        return 1

    async def call_all(self, method: str) -> dict[str, Any]:
        if method == "counters":
            return {}
        return {"worker": self.hashes[0] if len(self.hashes) == 1 else self.hashes.pop(0)}

    def stats(self) -> Any:
        class Stats:
            version = self.version

            def metrics(self) -> dict[str, float]:
                return {}

        return Stats()


@dataclass
class Fleet:
    vlm: Pool = field(default_factory=lambda: Pool("vlm"))
    vdm: Pool = field(default_factory=lambda: Pool("vdm"))
    reward: Pool = field(default_factory=lambda: Pool("reward"))
    conditions: Any = None
    scoring: Any = None
    resting: tuple[str, ...] = ()

    def pools(self) -> tuple[Pool, ...]:
        return (self.vlm, self.vdm, self.reward)


@dataclass
class Learner:
    """Counts versions; an update takes longer than a rollout."""

    version: int = 0
    seen: list[list[str]] = field(default_factory=list)

    async def update(self, items: list[Any], *, updates: int, epochs: int) -> dict[str, float]:
        await asyncio.sleep(0.01)
        self.version += 1
        self.seen.append(list(items))
        return {"loss": 0.0}

    async def publish(self, *, receivers: int = 0) -> list[Any]:
        return []

    async def base_hash(self) -> str:
        return "base"


@dataclass
class CountingStage:
    """Each group's rewards are 0 and 1; remembers which weights version rolled out which step."""

    staleness: int
    steps: int = 6
    fail_at: int = -1
    fleet: Fleet = field(default_factory=Fleet)
    served: dict[int, int] = field(default_factory=dict)
    name: str = "stage1"
    policies: tuple[str, ...] = ("vlm",)

    @property
    def section(self) -> Stage1Section:
        base = RunConfig().stage1
        rollout = RolloutSection(prompts_per_step=2, group_size=2, max_staleness=self.staleness)
        return base.model_copy(
            update={"steps": self.steps, "rollout": rollout, "rewards": type(base.rewards)(weights={"x": 1.0})}
        )

    async def draw(self, feed: SampleFeed, step: int, count: int, wave: int = 0) -> list[asyncio.Task[Group | None]]:
        samples = await feed.draw(count)
        return [asyncio.create_task(self.group(sample, step)) for sample in samples]

    async def group(self, sample: Sample, step: int) -> Group:
        version = self.served.setdefault(step, self.fleet.vlm.version)
        await asyncio.sleep(0.002)
        if step == self.fail_at:
            raise RuntimeError("a scorer is broken")
        members = tuple(
            Member(i, "c", Scores(sample.id, i, {"x": float(i)}), weights_version=version) for i in range(2)
        )
        return Group(sample, members)

    def experiences(self, batch: RolloutBatch, policy: str) -> list[Any]:
        return [g.sample.id for g in batch.groups for _ in g.members]

    def lost(self, step: int) -> list[str]:
        return []

    def passed_over(self, step: int) -> list[LeftOut]:
        return []

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        return {"stage/step": float(step)}


def train(
    stage: CountingStage, first_step: int = 0, feed: SampleFeed | None = None
) -> tuple[Any, Learner, list[StepReport]]:
    reports: list[StepReport] = []
    learner = Learner(version=first_step)
    stage.fleet.vlm.version = first_step

    async def on_step(report: StepReport) -> None:
        reports.append(report)

    feed = feed or SampleFeed(Numbers(), 2)
    result = asyncio.run(run_stage(stage, feed, {"vlm": learner}, first_step=first_step, on_step=on_step))
    return result, learner, reports


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_rollouts_are_never_staler_than_allowed_and_keep_their_order(staleness: int) -> None:
    stage = CountingStage(staleness)
    result, learner, reports = train(stage)
    lags = [step - version for step, version in sorted(stage.served.items())]
    assert max(lags) == staleness  # as far ahead as allowed, and no farther
    assert [r.step for r in reports] == list(range(6))
    assert learner.seen == [[f"0.{2 * s}"] * 2 + [f"0.{2 * s + 1}"] * 2 for s in range(5)] + [["1.0"] * 2 + ["1.1"] * 2]
    assert result.frozen_ok and len(result.history) == 6
    assert [metrics["stage/step"] for metrics in result.history] == list(range(6))


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_cursor_of_each_step_is_where_the_next_one_draws(staleness: int) -> None:
    _, _, reports = train(CountingStage(staleness))
    feed = SampleFeed(Numbers(), 2, reports[2].cursor)
    _, learner, _ = train(CountingStage(staleness), first_step=3, feed=feed)
    assert learner.seen[0] == ["0.6"] * 2 + ["0.7"] * 2


@pytest.mark.parametrize("frozen", ["vdm", "reward"])
def test_a_frozen_model_that_changed_voids_the_stage(frozen: str) -> None:
    stage = CountingStage(0)
    getattr(stage.fleet, frozen).hashes = ["before", "after"]
    with pytest.raises(TrainingError, match="frozen model changed"):
        train(stage)


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_bug_in_a_rollout_ends_the_stage_and_its_flights(staleness: int) -> None:
    async def whole() -> list[asyncio.Task[Any]]:
        stage = CountingStage(staleness, fail_at=2)

        async def on_step(report: StepReport) -> None: ...

        with pytest.raises(RuntimeError, match="a scorer is broken"):
            await run_stage(stage, SampleFeed(Numbers(), 2), {"vlm": Learner()}, on_step=on_step)
        await asyncio.sleep(0)
        return [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]

    assert asyncio.run(whole()) == []


def test_summary_compares_the_first_rewards_with_the_last() -> None:
    result, _, _ = train(CountingStage(0))
    assert result.summary() == {"steps": 6, "reward_first": 0.5, "reward_last": 0.5}


def test_numbers_source_is_what_the_feed_expects() -> None:
    first = next(Numbers().batches(3, Cursor(1, 9)))
    assert [s.id for s in first.samples] == ["1.9", "2.0", "2.1"]
