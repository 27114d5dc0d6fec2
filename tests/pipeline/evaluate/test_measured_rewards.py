"""Answers that are measured by rewards beside the table's own metrics: the real encoders, in this process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from actors.pool.errors import SampleFailed
from actors.records import Sample
from actors.scoring.model_worker import ModelWorker
from actors.scoring.worker import RewardWorker
from cluster.errors import ConfigError
from pipeline.config import RunConfig, load_config
from pipeline.data.toy import make_sample
from pipeline.evaluate.evaluation import score_systems
from pipeline.evaluate.predictions import Prediction
from pipeline.evaluate.table import EvaluationTable, require_metric
from pipeline.fleet.kinds import kinds_of
from pipeline.fleet.scoring import Scoring
from pipeline.report.page import table_view
from tests.pipeline.evaluate.local import truth_as_predictions
from tests.pipeline.fleet.test_scoring import Here

pytestmark = pytest.mark.slow


@dataclass
class Pool(Here):
    """A pool of one worker in this process."""

    async def call_all(self, name: str) -> dict[str, Any]:
        return {"only": getattr(self.worker, name)()}


@dataclass
class Fleet:
    """The pools that measure."""

    reward: Pool
    scoring: Any
    conditions: Any = None


def fleet(config: RunConfig) -> Fleet:
    """The pools that ``config`` measures answers with, made as a run makes them."""
    kinds = kinds_of(config)
    judges = {name: kind for name, kind in kinds.items() if kind.component is not None}
    reward = Pool(RewardWorker("reward-0", **kinds["reward"].arguments(config)))
    pools = {name: Pool(ModelWorker(f"{name}-0", **kind.arguments(config))) for name, kind in judges.items()}
    facts: dict[str, Any] = {}
    for pool in (reward, *pools.values()):
        pool.worker.setup()
        facts |= pool.worker.facts()
    scoring = Scoring(reward.submit, {str(judges[name].component): p.submit for name, p in pools.items()}, facts)
    return Fleet(reward, scoring if judges else None)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    toys = [make_sample(i, "test") for i in range(6)]
    return [
        Sample(t.id, t.kind, t.question, t.caption, t.input_frames, t.target_frames, meta=t.meta_json) for t in toys
    ]


def systems(samples: list[Sample]) -> dict[str, list[Prediction]]:
    held = [Prediction(s.id, s.caption, "", np.repeat(s.input_frames[-1:], 9, axis=0)) for s in samples[1:]]
    return {"held": [Prediction(samples[0].id, ""), *held], "truth": truth_as_predictions(samples)}


def table(config: RunConfig, samples: list[Sample]) -> EvaluationTable:
    return asyncio.run(score_systems(config, fleet(config), systems(samples), samples))  # type: ignore[arg-type]


def test_a_still_of_the_right_scene_is_like_the_truth_to_clip_and_not_to_the_video_encoder(
    samples: list[Sample],
) -> None:
    found = table(load_config("toy", ["evaluate.rewards=[video_similarity, motion]"]), samples)
    held, truth = found.figures("held"), found.figures("truth")
    assert truth["video_similarity"] == pytest.approx(1.0) and truth["motion"] == pytest.approx(1.0)
    assert held["clip_v"] > 0.6 and held["video_similarity"] < 0.2 and held["motion"] == 0.0
    assert found.systems["held"].metrics["all"]["video_similarity"].n == 5, "an unanswered question has no clip"
    text = found.markdown()
    assert "| video_similarity ↑" in text and "| motion ↑" in text and "(n=5)" in text
    assert found.comparison["all"]["video_similarity"].value > 0.8
    assert all("video_similarity" in answer for answer in found.to_json()["systems"]["truth"]["answers"])


def test_a_run_that_measures_by_no_reward_has_no_such_row(samples: list[Sample]) -> None:
    found = table(load_config("toy"), samples)
    assert "video_similarity" not in found.markdown() and "video_similarity" not in found.figures("truth")


def test_an_answer_that_a_reward_cannot_judge_is_left_out_of_it_alone(samples: list[Sample]) -> None:
    config = load_config("toy", ["evaluate.rewards=[video_similarity]"])
    pools = fleet(config)
    whole = pools.scoring._judges["video_similarity"]

    async def refusing(request: Any) -> Any:
        if request.sample_id == samples[2].id:
            raise SampleFailed("video_similarity-0: this clip has no direction")
        return await whole(request)

    scoring = Scoring(pools.reward.submit, {"video_similarity": refusing}, pools.scoring._facts)
    asked = score_systems(config, replace(pools, scoring=scoring), systems(samples), samples)  # type: ignore[arg-type]
    metrics = asyncio.run(asked).systems["truth"].metrics["all"]
    assert metrics["video_similarity"].n == 5 and metrics["clip_v"].n == 6 and metrics["frechet"].n == 6


def test_a_reward_that_judges_groups_measures_no_single_answer(samples: list[Sample]) -> None:
    variety = "models.rewards={variety: {model: 'tests.actors.scoring.my_judges:Variety'}}"
    with pytest.raises(ConfigError, match=r"evaluate\.rewards: 'variety' judges the answers of a group at once"):
        table(load_config("toy", [variety, "evaluate.rewards=[variety]"]), samples)


def test_a_reward_that_is_measured_may_choose_the_best_checkpoint() -> None:
    assert require_metric("video_similarity", ["video_similarity"])
    with pytest.raises(ConfigError, match=r"evaluate\.metric='video_similarity' is not known"):
        require_metric("video_similarity")


def test_a_runs_page_shows_them_too(samples: list[Sample]) -> None:
    found = table(load_config("toy", ["evaluate.rewards=[video_similarity]"]), samples)
    rows = dict(table_view(found.to_json())["rows"])
    assert list(rows)[-1] == "video_similarity ↑" and rows["video_similarity ↑"][1].startswith("1.000")
