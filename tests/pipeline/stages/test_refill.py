"""Dynamic sampling: what counts as a gradient, where replacements go, and that draws and cursors stay exact."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.records import Sample, Scores, derive_seed
from pipeline.config.stages import RolloutSection, Stage1Section
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.groups import NO_GRADIENT, TOO_FEW, Group, Member
from pipeline.stages.loop import StepReport
from pipeline.stages.refill import Refill, draw_key, has_gradient
from tests.pipeline.stages.test_feed import Numbers, Rows
from tests.pipeline.stages.test_loop import CountingStage, train

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)
OPTIONS: dict[str, Any] = {"normalise": False, "min_group": 2}


def group(name: str, *rewards: float, **more: list[float]) -> Group:
    columns = {"x": list(rewards), **more}
    members = tuple(
        Member(i, "c", Scores(name, i, {key: values[i] for key, values in columns.items()}))
        for i in range(len(rewards))
    )
    return Group(Sample(name, "predictive", "q", "c", FRAMES, FRAMES), members)


def names(refill: Refill) -> list[str | None]:
    return [g and g.sample.id for g in refill.groups]


def test_only_groups_whose_totals_differ_have_a_gradient() -> None:
    assert has_gradient(group("a", 0.0, 1.0), {"x": 1.0}, **OPTIONS)
    assert not has_gradient(group("a", 0.7, 0.7, 0.7), {"x": 1.0}, **OPTIONS)
    assert not has_gradient(group("a", 0.7), {"x": 1.0}, **OPTIONS)  # too few members were scored
    assert not has_gradient(None, {"x": 1.0}, **OPTIONS)  # quarantined
    cancelling = group("a", 0.0, 1.0, y=[1.0, 0.0])
    assert not has_gradient(cancelling, {"x": 1.0, "y": 1.0}, **OPTIONS)  # the total decides, not its components
    assert has_gradient(cancelling, {"x": 1.0, "y": 0.5}, **OPTIONS)


def test_replacements_take_the_first_free_places_in_the_order_of_their_draw() -> None:
    refill = Refill([group("a", 1, 1), group("b", 0, 1), None, group("d", 2, 2)], {"x": 1.0}, **OPTIONS, budget=9)
    assert refill.missing() == 3
    refill.add([group("e", 0, 0), group("f", 0, 1), group("g", 3, 1)])
    assert names(refill) == ["f", "b", "g", "d"]
    assert refill.missing() == 1
    refill.add([group("h", 5, 6)])
    assert names(refill) == ["f", "b", "g", "h"] and refill.missing() == 0
    assert refill.metrics() == {"rollout/refill_draws": 4.0, "rollout/refilled_groups": 3.0}
    assert [(left.group.sample.id, left.reason) for left in refill.beside] == [
        ("e", NO_GRADIENT),
        ("a", NO_GRADIENT),
        ("d", NO_GRADIENT),
    ]  # "b" counted, and in c's place there was none


def test_a_wave_of_too_few_members_is_told_apart_from_one_without_a_gradient() -> None:
    refill = Refill([group("a", 1, 1)], {"x": 1.0}, **OPTIONS, budget=1)
    refill.add([group("b", 1)])
    assert names(refill) == ["a"]
    assert [(left.group.sample.id, left.reason) for left in refill.beside] == [("b", TOO_FEW)]


def test_the_budget_bounds_the_draws_even_where_nothing_comes_of_them() -> None:
    refill = Refill([group("a", 1, 1), group("b", 1, 1), group("c", 1, 1)], {"x": 1.0}, **OPTIONS, budget=4)
    asked = []
    while count := refill.missing():
        asked.append(count)
        refill.add([])  # stage 2 may find no anchor
    assert asked == [3, 1]
    assert names(refill) == ["a", "b", "c"]  # what could not be replaced stays, and is counted as zero_std
    assert Refill([None], {"x": 1.0}, **OPTIONS, budget=0).missing() == 0


def test_waves_of_a_step_have_seeds_of_their_own() -> None:
    seeds = {derive_seed(0, "stage1", draw_key(step, wave), "s", "text") for step in range(12) for wave in range(12)}
    assert len(seeds) == 144
    assert derive_seed(0, "stage1", draw_key(7, 0), "s") == derive_seed(0, "stage1", 7, "s")  # as without refills


@dataclass
class FlatStage(CountingStage):
    """The samples in ``flat`` have equal rewards; scoring takes a time that differs from run to run."""

    flat: frozenset[str] = frozenset()
    refills: int = 4
    clock: random.Random = field(default_factory=random.Random)
    waves: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def section(self) -> Stage1Section:
        rollout = RolloutSection(
            prompts_per_step=2, group_size=2, max_staleness=self.staleness, max_refills=self.refills
        )
        return super().section.model_copy(update={"rollout": rollout})

    async def draw(self, feed: SampleFeed, step: int, count: int, wave: int = 0) -> list[asyncio.Task[Group | None]]:
        self.waves.append((step, wave, count))
        return await super().draw(feed, step, count, wave)

    async def group(self, sample: Sample, step: int) -> Group:
        made = await super().group(sample, step)
        await asyncio.sleep(self.clock.uniform(0, 0.004))
        return group(sample.id, 1.0, 1.0) if sample.id in self.flat else made


FLAT = frozenset({"0.1", "0.2", "0.4", "1.0", "1.1", "1.2"})
# Step 0 draws 0.0 and 0.1, replaces 0.1 by 0.2, and that by 0.3; step 1 draws 0.4 and 0.5, replaces 0.4 by 0.6; …
LEARNT = [["0.0", "0.3"], ["0.6", "0.5"], ["0.7", "0.8"], ["0.9", "1.3"], ["1.4", "1.5"], ["1.6", "1.7"]]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_draws_depend_on_rewards_and_not_on_who_is_first(staleness: int) -> None:
    for _ in range(3):
        stage = FlatStage(staleness, flat=FLAT)
        _, learner, reports = train(stage)
        assert [[items[0], items[2]] for items in learner.seen] == LEARNT
        assert stage.waves[:5] == [(0, 0, 2), (0, 1, 1), (0, 2, 1), (1, 0, 2), (1, 1, 1)]
        assert [r.metrics["rollout/refill_draws"] for r in reports] == [2, 1, 0, 3, 0, 0]
        assert [r.metrics["rollout/refilled_groups"] for r in reports] == [1, 1, 0, 1, 0, 0]
        assert all(r.metrics["advantage/zero_std_ratio"] == 0 for r in reports)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_resumed_run_draws_what_the_whole_one_drew(staleness: int, after: int) -> None:
    _, _, reports = train(FlatStage(staleness, flat=FLAT))
    cursor = FeedCursor.from_json(reports[after].cursor.to_json())
    _, learner, _ = train(FlatStage(staleness, flat=FLAT), first_step=after + 1, feed=SampleFeed(Numbers(), 2, cursor))
    assert [[items[0], items[2]] for items in learner.seen] == LEARNT[after + 1 :]


@settings(max_examples=15, deadline=None)
@given(
    flat=st.frozensets(st.sampled_from([f"{epoch}.r{row}" for epoch in range(4) for row in range(9)]), max_size=20),
    broken=st.frozensets(st.integers(0, 8), max_size=3),
    stops=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    staleness=st.integers(0, 2),
    size=st.integers(1, 4),
)
def test_a_run_that_is_resumed_again_and_again_learns_what_the_whole_one_learnt(
    flat: frozenset[str], broken: frozenset[int], stops: list[int], staleness: int, size: int
) -> None:
    def part(
        first: int, last: int, staleness: int, cursor: FeedCursor | None = None
    ) -> tuple[list[list[str]], FeedCursor]:
        """The steps from ``first`` to ``last``: what was learnt, and the cursor of the checkpoint at the end."""
        feed = SampleFeed(Rows(9, broken), size, *([cursor] if cursor else []))  # type: ignore[arg-type]
        stage = FlatStage(staleness, steps=last, flat=flat, clock=random.Random(0))
        _, learner, reports = train(stage, first_step=first, feed=feed)
        return learner.seen, FeedCursor.from_json(reports[-1].cursor.to_json())

    whole, _ = part(0, 6, 0)
    learnt, cursor, done = [], None, 0
    for stop in [*sorted({*stops}), 6]:
        seen, cursor = part(done, stop, staleness, cursor)
        learnt += seen
        done = stop
    assert learnt == whole


def test_without_refills_flat_groups_are_kept_and_counted() -> None:
    _, learner, reports = train(FlatStage(0, flat=FLAT, refills=0))
    assert learner.seen[0] == ["0.0"] * 2 + ["0.1"] * 2
    assert reports[0].metrics["advantage/zero_std_ratio"] == 0.5
    assert "rollout/refill_draws" not in reports[0].metrics


def test_a_spent_budget_leaves_the_rest_in_the_batch() -> None:
    everything = frozenset(f"{epoch}.{i}" for epoch in range(9) for i in range(10))
    reports: list[StepReport]
    _, learner, reports = train(FlatStage(0, steps=2, flat=everything, refills=3))
    assert [[items[0], items[2]] for items in learner.seen] == [["0.0", "0.1"], ["0.5", "0.6"]]
    assert reports[0].metrics["rollout/refill_draws"] == 3 and reports[0].metrics["advantage/zero_std_ratio"] == 1.0


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_bug_in_a_refill_ends_the_stage_and_its_flights(staleness: int) -> None:
    class Broken(FlatStage):
        async def group(self, sample: Sample, step: int) -> Group:
            if sample.id == "0.2":
                raise RuntimeError("a scorer is broken")
            return await super().group(sample, step)

    async def leftovers() -> list[asyncio.Task[Any]]:
        from pipeline.stages.loop import run_stage
        from tests.pipeline.stages.test_loop import Learner

        async def on_step(report: StepReport) -> None: ...

        stage = Broken(staleness, flat=FLAT)
        with pytest.raises(RuntimeError, match="a scorer is broken"):
            await run_stage(stage, SampleFeed(Numbers(), 2), {"vlm": Learner()}, on_step=on_step)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]

    assert asyncio.run(leftovers()) == []
