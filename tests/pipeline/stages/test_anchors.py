"""Anchors of stage 2 that are refused or cannot be compared: told, counted, bounded, and kept for the rollouts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from actors.records import Completion, CompletionRequest
from cluster.errors import ConfigError, TrainingError
from pipeline.config import load_config
from pipeline.stages.feed import SampleFeed
from pipeline.stages.groups import FailureBudget, Group, RolloutBatch
from pipeline.stages.loop import judged
from pipeline.stages.stage2 import Stage2
from tests.pipeline.stages.test_stage2 import Fleet, Toys, fleet, sample, settings

__all__ = ["fleet"]  # a fixture, which tests name

WORDLESS = "\U0001f408\u27a1"


class Captions(Toys):
    """Toys' order; every sample whose number is in ``unreadable`` has a caption without letters or digits."""

    def __init__(self, unreadable: set[int]) -> None:
        super().__init__()
        self.unreadable = unreadable

    def batches(self, size: int, cursor: Any = None) -> Any:
        for samples, bad, after in super().batches(size, cursor):
            odd = [int(s.id.split(".")[1]) in self.unreadable for s in samples]
            yield [replace(s, caption=WORDLESS) if o else s for s, o in zip(samples, odd)], bad, after


@dataclass
class SureThinker:
    """Says one caption, by default the toys', whatever it is asked; counts how often."""

    asked: int = 0
    caption: str = "the red circle rises"

    async def submit(self, request: CompletionRequest) -> list[Completion]:
        self.asked += 1
        text = f"<think></think><ans>{self.caption}</ans>"
        return [Completion(text, np.zeros(3, np.int32), np.zeros(3, np.float32), "stop", 0)]


def stage_of(fleet: Fleet, thinker: SureThinker | None = None, **options: Any) -> Stage2:
    config = settings(rollout={"group_size": 2}, window_size=1)
    section = config.stage2.model_copy(update=options)
    return Stage2(
        config.model_copy(update={"stage2": section}), Fleet(fleet.vdm, fleet.reward, vlm=thinker or SureThinker())
    )  # type: ignore[arg-type]


def test_a_caption_that_cannot_be_compared_is_lost_counted_and_bounded(fleet: Fleet) -> None:
    """Its sample gets no group, the step is complete without it, and the budget knows."""
    stage, feed = stage_of(fleet), SampleFeed(Captions({1}), 2)  # type: ignore[arg-type]
    budget = FailureBudget("stage2", 0.1)

    async def body() -> list[Group | None]:
        return await judged(stage, 0, await stage.draw(feed, 0, 2), budget)  # type: ignore[arg-type]

    groups = asyncio.run(body())
    assert [g.sample.id for g in groups if g] == ["0.0", "0.2"]
    assert (budget.asked, budget.lost.total()) == (6, 2)  # two trajectories of each, the lost ones included
    (reason,) = budget.lost
    assert "cannot be compared" in reason and "letters or digits" in reason
    assert stage.lost(0) == []  # told once
    (left,) = stage.passed_over(0)
    assert left.group.sample.id == "0.1" and left.reason == reason and not left.group.members
    metrics = stage.metrics(RolloutBatch((), (), ()), 0)
    assert (metrics["anchor/failed"], metrics["anchor/kept"]) == (1.0, 2.0)
    assert stage.passed_over(0) == []  # the step has ended


def test_an_anchor_below_the_threshold_is_passed_over_with_its_caption_and_score(fleet: Fleet) -> None:
    thinker = SureThinker(caption="the red circle falls")
    stage, feed = stage_of(fleet, thinker, anchor_min_rouge=0.99, anchor_max_draws=1), SampleFeed(Captions(set()), 2)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"no anchor caption out of 2"):
        asyncio.run(stage.draw(feed, 0, 2))  # type: ignore[arg-type]
    left = stage.passed_over(0)
    assert [each.group.sample.id for each in left] == ["0.0", "0.1"]
    assert {each.caption for each in left} == {"the red circle falls"}
    assert all("ROUGE-L 0.750 to the truth, below stage2.anchor_min_rouge=0.99" in each.reason for each in left)


def test_too_many_captions_that_cannot_be_compared_stop_the_stage(fleet: Fleet) -> None:
    stage, feed = stage_of(fleet), SampleFeed(Captions({1, 3, 5, 7, 9}), 2)  # type: ignore[arg-type]

    async def until_it_stops() -> int:
        budget = FailureBudget("stage2", 0.1)
        for step in range(40):
            tasks = await stage.draw(feed, step, 2)  # type: ignore[arg-type]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            budget.count([], stage.lost(step))
        return step

    with pytest.raises(TrainingError, match=r"max_failed_ratio=0\.1(?s:.*)letters or digits"):
        asyncio.run(until_it_stops())


def test_captions_of_which_none_can_be_compared_stop_the_stage_at_once(fleet: Fleet) -> None:
    stage = stage_of(fleet, anchor_max_draws=3)
    feed = SampleFeed(Captions(set(range(10))), 2)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"no anchor caption for any of 6 samples: .*letters or digits"):
        asyncio.run(stage.draw(feed, 0, 2))
    assert stage.fleet.vlm.asked == 6  # type: ignore[attr-defined]


def test_the_greedy_answer_about_such_a_sample_is_remembered_too(fleet: Fleet) -> None:
    stage = stage_of(fleet)
    odd = replace(sample(), caption=WORDLESS)
    first, again = (asyncio.run(stage.anchor(odd, str(step))) for step in (0, 1))
    assert first == again and first.caption is None and stage.fleet.vlm.asked == 1  # type: ignore[attr-defined]


def test_a_share_of_anchors_is_the_truth_by_run_seed_step_and_sample(fleet: Fleet) -> None:
    samples = [replace(sample(), id=str(i), caption="the blue square grows") for i in range(200)]

    def kept(step: str, share: float, seed: int = 0) -> set[str]:
        stage = stage_of(fleet, anchor_truth_share=share)
        stage = replace(stage, config=stage.config.model_copy(update={"seed": seed}))
        anchors = [asyncio.run(stage.anchor(s, step)) for s in samples]
        assert {a.caption for a in anchors} <= {"the blue square grows", "the red circle rises"}
        assert all(a.text == "" and a.rouge_l == 1.0 for a in anchors if a.caption == "the blue square grows")
        return {s.id for s, a in zip(samples, anchors, strict=True) if a.caption == "the blue square grows"}

    third = kept("3", 0.33)
    assert 45 <= len(third) <= 90 and kept("3", 0.33) == third
    assert kept("4", 0.33) != third != kept("3", 0.33, seed=1)
    assert third < kept("3", 0.66), "a larger share keeps the same ones, and more"
    assert kept("3", 0.0) == set() and len(kept("3", 1.0)) == 200


def test_a_share_of_all_true_captions_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"anchor=truth with anchor_truth_share=0\.5: true captions are drawn for all"
    ):
        load_config("toy", ["stage2.anchor=truth", "stage2.anchor_truth_share=0.5"])
