"""Stages whose rewards have models: who is asked for what, what is drawn, what a group reward sees."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from actors.failures import Ok
from actors.pool.errors import SampleFailed
from actors.records import ScoreRequest
from actors.scoring.model_worker import ModelWorker
from actors.scoring.worker import RewardWorker
from pipeline.config import load_config
from pipeline.fleet.models import resolve_model
from pipeline.fleet.scoring import Scoring
from pipeline.stages.stage1 import Stage1
from tests.pipeline.stages.test_stage1 import Artist, Thinker, sample

pytestmark = pytest.mark.slow

HERE = "tests.actors.scoring.my_judges"


@dataclass
class Here:
    """A pool of one worker in this process, which remembers what it was asked."""

    worker: Any
    asked: list[Any] = field(default_factory=list)

    async def submit(self, request: Any) -> Any:
        self.asked.append(request)
        (outcome,) = self.worker.process([request])
        if not isinstance(outcome, Ok):
            raise SampleFailed(outcome.message)
        return outcome.value


@dataclass
class Fleet:
    vlm: Any
    vdm: Any
    reward: Any
    scoring: Any
    conditions: Any = None


def fleet(shared: tuple[str, ...], **judges: Any) -> tuple[Fleet, dict[str, Here]]:
    """A fleet whose reward pool answers for ``shared``, and each of ``judges`` (class, options) for itself."""
    reward = RewardWorker("reward-0", resolve_model("tiny", "clip"), shared)
    workers: dict[str, Any] = {
        name: ModelWorker(f"{name}-0", name, f"{HERE}:{cls}", o) for name, (cls, o) in judges.items()
    }
    pools = {name: Here(worker) for name, worker in {"reward": reward, **workers}.items()}
    facts: dict[str, Any] = {}
    for pool in pools.values():
        pool.worker.setup()
        facts |= pool.worker.facts()
    scoring = Scoring(pools["reward"].submit, {name: pools[name].submit for name in judges}, facts)
    return Fleet(Thinker(), Artist(), pools["reward"], scoring), pools


def group(found: Fleet, weights: dict[str, float]) -> Any:
    overrides = ["stage1.rollout.group_size=4", "models.rewards={}"]
    config = load_config("toy", overrides)
    section = config.stage1.model_copy(
        update={"rewards": config.stage1.rewards.model_copy(update={"weights": weights})}
    )
    stage = Stage1(config.model_copy(update={"stage1": section}), found)  # type: ignore[arg-type]
    return asyncio.run(stage.group(sample(), "0"))


def test_each_pool_is_asked_for_its_own_and_sent_no_more_than_it_looks_at() -> None:
    found, pools = fleet(("format", "clip_v"), bright=("Brightness", {}), watcher=("Watcher", {}))
    done = group(found, {"format": 1.0, "bright": 0.5, "clip_v": 1.0, "watcher": 0.5})
    assert not done.failures and len(done.members) == 4
    drawn = done.members[0].scores
    assert list(drawn.values) == ["format", "bright", "clip_v", "watcher"] and drawn.values["watcher"] == 1.0
    assert drawn.diagnostics["motion_ratio"] >= 0.0, "the signs of reward hacking come along"
    assert done.members[3].scores.values == {"format": 0.0, "bright": 0.0, "clip_v": 0.0, "watcher": 0.0}
    bright: ScoreRequest = pools["bright"].asked[0]
    assert bright.components == ("bright",) and bright.question == "" and bright.input_frames is None
    assert len(bright.target_frames) == 0 and len(pools["bright"].asked) == 3, "a malformed answer has nothing to judge"
    watched: ScoreRequest = pools["watcher"].asked[0]
    assert watched.question == sample().question and watched.input_frames is not None
    assert pools["reward"].asked[0].components == ("format", "clip_v")


@pytest.mark.parametrize(
    ("judges", "weights", "draws"),
    [
        ({"length": ("Length", {})}, {"format": 1.0, "length": 1.0}, False),
        ({"variety": ("Variety", {})}, {"format": 1.0, "variety": 1.0}, False),
        ({"bright": ("Brightness", {})}, {"format": 1.0, "bright": 1.0}, True),
    ],
)
def test_a_run_whose_rewards_need_only_text_draws_nothing(judges: Any, weights: dict[str, float], draws: bool) -> None:
    found, _ = fleet(("format",), **judges)
    group(found, weights)
    assert bool(found.vdm.asked) is draws


def test_a_function_of_the_text_draws_nothing_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "text_test_reward.py").write_text(
        "def words(*, caption, question, **_):\n    return len(caption.split()) / len(question)\n"
        "def red(*, clip, **_):\n    return float(clip.mean())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, draws in (("words", False), ("red", True)):
        path = f"text_test_reward:{name}"
        found, _ = fleet(("format", path))
        done = group(found, {"format": 1.0, path: 1.0})
        assert bool(found.vdm.asked) is draws and len(done.members) == 4
        assert draws or done.members[0].scores.values[path] == 4 / len(sample().question)


def test_a_group_reward_sees_the_whole_group_and_a_malformed_answer_earns_0() -> None:
    found, pools = fleet(("format",), variety=("Variety", {}))
    done = group(found, {"format": 1.0, "variety": 1.0})
    assert [m.scores.values["variety"] for m in done.members] == [0.5, 0.5, 1.0, 0.0]
    (request,) = pools["variety"].asked
    assert [answer.index for answer in request.answers] == [0, 1, 2] and request.sample_id == sample().id


def test_a_group_that_cannot_be_judged_leaves_with_the_reason() -> None:
    found, _ = fleet(("format",), variety=("Variety", {}))

    async def refusing(request: Any) -> Any:
        raise SampleFailed("variety-0: these answers cannot be compared")

    found = replace(found, scoring=Scoring(found.reward.submit, {"variety": refusing}, found.scoring._facts))
    done = group(found, {"format": 1.0, "variety": 1.0})
    assert done.members == () and done.failures == ("variety-0: these answers cannot be compared",) * 4
