"""The judge, against a scripted endpoint: values, both orders of a pair, what is no verdict, and what is paid for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from actors.endpoint.forms import picture_part
from actors.failures import Failure, Ok
from actors.scoring.asking import ModelScorer
from actors.scoring.judge import Judge, JudgeSection, _pictures
from actors.scoring.model import RewardLoadError, facts_of, load_model, start_model
from tests.scripted_server import ScriptedServer, completion, images_of, text_of

PATH = "actors.scoring.judge:Judge"


def judging(server: ScriptedServer, **options: Any) -> ModelScorer:
    chosen = {"model": "scripted", "base_url": server.base_url, "tries": 1, "longest_wait_s": 0.0, **options}
    model = load_model(PATH, chosen)
    start_model(PATH, model, "cpu", "float32")
    return ModelScorer("judge", PATH, model, facts_of(PATH, model), wait_s=0.0)


def asked(request_for: Any, *captions: str, **more: Any) -> list[Any]:
    return [
        request_for(i, ("judge",), caption=caption, question="what next?", **more) for i, caption in enumerate(captions)
    ]


def points(score: int) -> str:
    return json.dumps({"why": "because", "score": score})


def test_points_become_values_and_the_judge_sees_clip_question_captions_and_rubric(request_for: Any) -> None:
    seen: list[dict[str, Any]] = []

    def script(form: str, body: dict[str, Any], before: int) -> str:
        seen.append(body)
        return points(7 if "rises" in text_of(body) else 2)

    with ScriptedServer(script) as server:
        judge = judging(server, rubric="ten for red", frames=3)
        outcomes = judge.score(asked(request_for, "it rises", "it falls"))
    assert [o.value.values["judge"] for o in outcomes] == [0.7, 0.2]
    for body in seen:
        assert all(part in text_of(body) for part in ("what next?", "ten for red", "What really happened"))
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["why", "score"]
        assert 1 <= images_of(body) <= 3
    assert judge.model.counters() == {"asks": 2, "failed": 0, "tokens_in": 200, "tokens_out": 40, "cost": 0.0}


def test_a_verdict_in_a_fence_is_read(request_for: Any) -> None:
    """As models write that are held to the form by the prompt alone."""
    with ScriptedServer(lambda form, body, before: f"```json\n{points(6)}\n```") as server:
        (outcome,) = judging(server, structured="prompt").score(asked(request_for, "it rises"))
    assert outcome.value.values["judge"] == 0.6


def test_several_samples_are_averaged_each_with_its_seed(request_for: Any) -> None:
    scores, seeds = iter([10, 5, 0, 3]), set()

    def script(form: str, body: dict[str, Any], before: int) -> str:
        seeds.add(body["seed"])
        return points(next(scores))

    with ScriptedServer(script) as server:
        (outcome,) = judging(server, samples=4, price_in=10.0, concurrency=1).score(asked(request_for, "it rises"))
    assert outcome.value.values["judge"] == pytest.approx(0.45) and len(seeds) == 4


@pytest.mark.parametrize(
    ("prefers", "value"),
    [("first", 0.5), ("ours", 1.0), ("theirs", 0.0), ("nobody", 0.5)],
)
def test_a_pair_is_asked_in_both_orders(request_for: Any, prefers: str, value: float) -> None:
    """A judge that always likes what it sees first is worth nothing; one that likes the brighter clip is heard."""

    def script(form: str, body: dict[str, Any], before: int) -> str:
        first, _ = (part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
        ours = ours_first[0] == first
        better = {"first": "A", "nobody": "equal", "ours": "A" if ours else "B", "theirs": "B" if ours else "A"}[
            prefers
        ]
        return json.dumps({"why": "so", "better": better})

    ours_first: list[str] = []
    clip, truth = np.full((4, 32, 32, 3), 200, np.uint8), np.full((4, 32, 32, 3), 20, np.uint8)
    ours_first += [picture_part(jpeg)["image_url"]["url"] for jpeg in _pictures(clip, 1)]
    with ScriptedServer(script) as server:
        judge = judging(server, against="truth", frames=1)
        (outcome,) = judge.score(asked(request_for, "it rises", clip=clip, target_frames=truth))
    assert outcome.value.values["judge"] == value and server.forms["choice"] == 2


def test_the_input_is_shown_where_it_is_asked_for(request_for: Any) -> None:
    shown: list[int] = []

    def script(form: str, body: dict[str, Any], before: int) -> str:
        shown.append(images_of(body))
        return points(1)

    frames = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    with ScriptedServer(script) as server:
        request = asked(request_for, "it rises", input_frames=frames)
        for shows in (False, True):
            judging(server, shows_input=shows, frames=2).score(request)
    assert shown == [2, 4]
    assert Judge(model="m", shows_input=True, base_url="http://x/v1").needs == (
        "text",
        "clip",
        "question",
        "input_video",
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (completion("I cannot judge this", refusal="no"), "refused"),
        (completion('{"why": "long', "length"), "truncated"),
        (completion(""), "empty"),
        ("eight of ten", "another form"),
        (points(11), "another form"),
        (json.dumps({"score": 3}), "another form"),
        ("[" * 50_000, "another form"),
    ],
)
def test_what_is_no_verdict_is_a_failure_and_no_zero_and_costs_its_answer_alone(
    request_for: Any, said: Any, told: str
) -> None:
    with ScriptedServer(lambda form, body, before: said if "bad" in text_of(body) else points(4)) as server:
        judge = judging(server)
        good, bad, other = judge.score(asked(request_for, "it rises", "bad one", "it falls"))
    assert isinstance(good, Ok) and isinstance(other, Ok) and good.value.values["judge"] == 0.4
    assert isinstance(bad, Failure) and bad.kind == "data" and told in bad.message
    assert judge.model.counters()["failed"] == 2  # in the batch, and once alone
    assert judge.model.counters()["asks"] == 4  # those with a verdict are not asked again


def test_an_endpoint_that_hangs_is_given_up_and_the_others_are_judged(request_for: Any) -> None:
    def script(form: str, body: dict[str, Any], before: int) -> Any:
        async def late() -> str:
            await asyncio.sleep(3.0)
            return points(9)

        return late() if "slow" in text_of(body) else points(4)

    with ScriptedServer(script) as server:
        judge = judging(server, timeout_s=0.4)
        slow, good = judge.score(asked(request_for, "slow one", "it rises"))
    assert isinstance(slow, Failure) and "time out" in slow.message
    assert isinstance(good, Ok)


def test_a_judge_that_is_not_there_or_refuses_the_key_stops_the_run_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ScriptedServer(key="right") as server:
        monkeypatch.setenv("JUDGE_KEY", "wrong")
        with pytest.raises(RewardLoadError, match="JUDGE_KEY"):
            judging(server, key_variable="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "right")
        judging(server, key_variable="JUDGE_KEY")
        with pytest.raises(RewardLoadError, match=r"no_such"):
            judging(server, key_variable="JUDGE_KEY", model="no_such")
        gone = server.base_url
    with pytest.raises(RewardLoadError, match="nothing answers there"):
        start_model(PATH, load_model(PATH, {"model": "m", "base_url": gone}), "cpu", "float32")
    with pytest.raises(RewardLoadError, match="rubrik"):
        load_model(PATH, {"model": "m", "base_url": gone, "rubrik": "x"})


def test_the_settings_are_an_endpoints_with_its_own_beside_them() -> None:
    section = JudgeSection(model="m")
    assert (section.samples, section.against, section.max_tokens, section.temperature) == (1, "rubric", 256, 0.7)
