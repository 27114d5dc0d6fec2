"""Stage 1's group: what is drawn, and what a malformed answer earns."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from actors.failures import Failure
from actors.pool.errors import SampleFailed
from actors.records import Clip, Completion, CompletionRequest, RenderRequest, Sample, ScoreRequest, Scores
from actors.scoring.scorer import Scorer
from pipeline.config import load_config
from pipeline.data.toy import make_sample
from pipeline.stages.all_in_one import AllInOne
from pipeline.stages.stage1 import Stage1
from rewards.text import rouge_l

TEXTS = (
    "<think> a </think> <ans> the red circle rises </ans>",
    "<think> a </think> <ans> the red circle rises </ans>",
    "<think> a </think> <ans> the red circle falls </ans>",
    "no form at all",
)


@dataclass
class Thinker:
    """Answers with ``TEXTS``."""

    async def submit(self, request: CompletionRequest) -> list[Completion]:
        ids = np.zeros(3, np.int32)
        return [Completion(text, ids, np.zeros(3, np.float32), "stop", 0) for text in TEXTS[: request.n]]


@dataclass
class Artist:
    """Draws nothing but remembers what it was asked for."""

    asked: list[str] = field(default_factory=list)

    async def submit(self, request: RenderRequest) -> Clip:
        self.asked.append(request.caption)
        frames = np.zeros((request.num_frames, 32, 32, 3), np.uint8)
        return Clip(request.sample_id, request.index, request.caption, frames, 0)


@dataclass
class Judge:
    """The real scorer with the bundled CLIP."""

    scorer: Scorer

    async def submit(self, request: ScoreRequest) -> Scores:
        outcome = self.scorer.score([request])[0]
        return outcome.value  # type: ignore[union-attr]


@dataclass
class Fleet:
    vlm: Any
    vdm: Any
    reward: Any
    conditions: Any = None
    scoring: Any = None


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    from actors.scoring.clip import ClipScorer
    from pipeline.fleet.models import resolve_model

    return Scorer(ClipScorer(resolve_model("tiny", "clip")))


def sample() -> Sample:
    toy = make_sample(0, "val")
    return Sample(toy.id, toy.kind, toy.question, toy.caption, toy.input_frames, toy.target_frames)  # type: ignore[arg-type]


def group(scorer: Scorer, *overrides: str) -> tuple[list[dict[str, float]], list[str]]:
    """The members' values and what the artist was asked for."""
    config = load_config("toy", ["stage1.rollout.group_size=4", *overrides])
    artist = Artist()
    stage = Stage1(config, Fleet(Thinker(), artist, Judge(scorer)))  # type: ignore[arg-type]
    found = asyncio.run(stage.group(sample(), "0"))
    assert found is not None and not found.failures
    return [m.scores.values for m in found.members], artist.asked


def test_equal_captions_are_drawn_once_and_a_malformed_answer_never(scorer: Scorer) -> None:
    values, asked = group(scorer)
    assert sorted(asked) == ["the red circle falls", "the red circle rises"]
    assert values[0] == values[1] and values[0]["clip_v"] != 0.0
    assert values[3] == {"format": 0.0, "rouge_l": 0.0, "clip_v": 0.0}


def test_a_run_with_other_tags_reads_its_captions_and_pays_its_format_by_them(scorer: Scorer) -> None:
    """All four answers are in the default format, which is only text to this run; read leniently it is drawn, and not paid."""
    tags = "models.prompt.answer_tag='[Ans]'", "models.prompt.think_tag='[Think]'"
    released = Scorer(scorer.clip, answers=load_config("toy", tags).models.prompt.answers)
    values, asked = group(released, *tags)
    assert asked == [] and all(value == {"format": 0.0, "rouge_l": 0.0, "clip_v": 0.0} for value in values)
    values, asked = group(released, *tags, "models.prompt.caption=first")
    assert sorted(asked) == sorted({*TEXTS})
    assert [value["format"] for value in values] == [0.0] * 4 and values[3]["clip_v"] != 0.0


def test_text_rewards_alone_draw_nothing(scorer: Scorer) -> None:
    values, asked = group(scorer, "stage1.rewards.weights={format: 1.0, rouge_l: 1.0}")
    assert asked == []
    truth = sample().caption
    captions = ("the red circle rises", "the red circle rises", "the red circle falls")
    assert values == [
        *({"format": 1.0, "rouge_l": rouge_l(c, truth)} for c in captions),
        {"format": 0.0, "rouge_l": 0.0},
    ]


def test_a_sample_that_the_thinker_refuses_is_a_group_of_reasons(scorer: Scorer) -> None:
    class Refusing:
        async def submit(self, request: CompletionRequest) -> list[Completion]:
            raise SampleFailed("vlm-0: the question is too long")

    config = load_config("toy", ["stage1.rollout.group_size=4"])
    found = asyncio.run(Stage1(config, Fleet(Refusing(), Artist(), Judge(scorer))).group(sample(), "0"))  # type: ignore[arg-type]
    assert found is not None and found.members == () and found.failures == ("vlm-0: the question is too long",) * 4


@pytest.mark.parametrize("kind", [Stage1, AllInOne])
def test_answers_that_no_reward_can_judge_leave_their_group(scorer: Scorer, kind: type[Stage1]) -> None:
    """The truth has no letter, so ROUGE-L has no value. A malformed answer still has its 0 by definition."""

    class Refusing(Judge):
        async def submit(self, request: ScoreRequest) -> Scores:
            outcome = self.scorer.score([request])[0]
            if isinstance(outcome, Failure):
                assert outcome.kind == "data"
                raise SampleFailed(outcome.message)
            return outcome.value

    config = load_config("toy", ["stage1.rollout.group_size=4"])
    stage = kind(config, Fleet(Thinker(), Artist(), Refusing(scorer)))  # type: ignore[arg-type]
    found = asyncio.run(stage.group(replace(sample(), caption="\U0001f408\u27a1"), "0"))
    assert found is not None and [m.index for m in found.members] == [3] and len(found.failures) == 3
    assert all("letters or digits" in reason for reason in found.failures)
    assert stage.lost(0) == []
