"""How stages ask: structured answers, one repair, replies that are kept, and the asking stages against a scripted server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.endpoint.client import Endpoint
from actors.endpoint.forms import parse_form
from pipeline.data.build.asking import Asker, BudgetSpentError, PendingError, Rejected, Request
from pipeline.data.build.models import EngineSection, ModelSection, Shown
from pipeline.data.build.predictive import WhatIf
from pipeline.data.build.procedural import Describe, Question
from pipeline.data.build.review import Review
from pipeline.data.build.schemas import Verdict, Wording
from pipeline.data.build.shared import Build, video_of, video_to_json
from pipeline.data.build.store import WorkArea
from pipeline.data.build.video import Clip, Pair, Video
from pipeline.data.video import encode_mp4
from tests.scripted_server import (
    DESCRIPTION,
    VERDICT,
    WHAT_IFS,
    WORDING,
    ScriptedServer,
    completion,
    images_of,
    text_of,
)

REQUEST = Request("Be literal.", "Say it.", Wording, (), "pair 0-1")
ZH = {
    "question": "这一步做完之后，接下来应该怎么继续？",
    "reasoning": "这一步已经完成，按照通常的做法，接下来会使用准备好的东西继续。",
    "caption": "一只大兔子走出洞口，在树下伸懒腰。",
}


@pytest.fixture
def area(tmp_path: Path) -> WorkArea:
    return WorkArea(tmp_path / "_build")


@pytest.fixture
def clips(area: WorkArea) -> list[str]:
    frames = np.zeros((8, 48, 64, 3), np.uint8)
    return [area.put(encode_mp4(frames + 40 * number, 8.0, near_lossless=False)) for number in range(3)]


def asker(server: ScriptedServer, area: WorkArea, stage: str = "question", **settings: Any) -> Asker:
    model = ModelSection(model="scripted", base_url=server.base_url, frames=3, frame_side=32, **settings)
    made = Asker(stage, "writer", model, area, endpoint=Endpoint("models.writer", model, sleep=lambda _: None))
    made.begin()
    return made


def stage_of(kind: Any, made: Asker, languages: tuple[str, ...] = ("en",), **settings: Any) -> Any:
    build = Build(Path("/nowhere"), made.area, languages=languages, asker=made)
    stage = kind(settings=kind.Settings(model="writer", **settings), build=build)
    stage.setup()
    return stage


def video(clips: list[str]) -> Video:
    parts = [Clip(i, 2.0 * i, 2.0 * i + 1, label=f"step {i}", stored=name) for i, name in enumerate(clips)]
    return Video("film", "film.mp4", clips=parts, pairs=[Pair(0, 1, "predictive"), Pair(1, 2, "predictive")])


def wording(**changed: str) -> str:
    return json.dumps({**WORDING, **changed}, ensure_ascii=False)


# --- one ask ------------------------------------------------------------------------------------------------------------


def test_an_answer_is_kept_and_never_asked_for_again(area: WorkArea) -> None:
    with ScriptedServer() as server:
        for _ in range(2):
            made = asker(server, area)
            assert made.all([REQUEST]) == [Wording(**WORDING)]
            assert (made.taken().asks, made.taken().tokens_in) == (1, 100)
        assert sum(server.seen.values()) == 1
        asker(server, area, temperature=0.5).all([REQUEST])  # another setting is another ask
        asker(server, area, stage="review").all([REQUEST])
        assert sum(server.seen.values()) == 3


def test_what_is_no_json_is_repaired_once_by_showing_it(area: WorkArea) -> None:
    asked: list[str] = []

    def script(form: str, body: Any, before: int) -> Any:
        asked.append(text_of(body))
        return None if "It cannot be used" in asked[-1] else "Sure! Here is the JSON"

    with ScriptedServer(script) as server:
        assert asker(server, area).all([REQUEST]) == [Wording(**WORDING)]
    assert len(asked) == 2
    assert "Sure! Here is the JSON" in asked[1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("nonsense", "not JSON"),
        ('{"question": "a"}', "wrong form"),
        (json.dumps({**WORDING, "more": 1}), "wrong form"),
        (json.dumps({**WORDING, "caption": " "}), "wrong form"),
        ("[" * 100_000, "wrong form"),
        (completion(None, refusal="no"), "refused"),
        (completion("half", "length"), "truncated"),
        (completion(""), "empty"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_stays_wrong_is_rejected_with_the_raw_answer(answer: Any, reason: str, area: WorkArea) -> None:
    with ScriptedServer(lambda *_: answer) as server:
        [said] = asker(server, area).all([REQUEST])
        assert isinstance(said, Rejected)
        assert said.reason == reason
        assert len(said.raw) <= 2000
        if isinstance(answer, str):
            assert said.raw == answer[:2000]
        assert sum(server.seen.values()) == 2


def test_a_truncated_answer_is_asked_for_with_twice_the_room(area: WorkArea) -> None:
    most: list[int] = []

    def script(form: str, body: Any, before: int) -> Any:
        most.append(body["max_tokens"])
        return completion("{", "length") if len(most) == 1 else None

    with ScriptedServer(script) as server:
        assert asker(server, area, max_tokens=64).all([REQUEST]) == [Wording(**WORDING)]
    assert most == [64, 128]


def test_a_server_that_fails_rejects_and_keeps_nothing(area: WorkArea) -> None:
    from aiohttp import web

    with ScriptedServer(lambda *_: web.json_response({}, status=500)) as server:
        [said] = asker(server, area, tries=2).all([REQUEST])
    assert isinstance(said, Rejected)
    assert said.reason == "server error"
    assert not (Path(area.folder) / "asks").exists()  # type: ignore[arg-type]


def test_no_more_asks_at_a_time_than_threads(area: WorkArea) -> None:
    with ScriptedServer(delay_s=0.05) as server:
        made = replace(asker(server, area), threads=3)
        made.begin()
        made.all([replace(REQUEST, part=f"pair {n}") for n in range(12)])
        assert server.most == 3
        assert sum(server.seen.values()) == 12


def test_a_spent_budget_asks_nothing(area: WorkArea) -> None:
    class Empty:
        def allows(self) -> bool:
            return False

        def add(self, tokens: int, cost: float) -> None:
            raise AssertionError

    with ScriptedServer() as server:
        made = replace(asker(server, area), meter=Empty())
        made.begin()
        with pytest.raises(BudgetSpentError):
            made.all([REQUEST])
        assert not server.seen


def test_an_engine_gets_all_asks_at_once(area: WorkArea) -> None:
    model = ModelSection(model="/models/vlm", engine=EngineSection())
    made = Asker("question", "writer", model, area)
    made.setup()
    made.begin()
    with pytest.raises(PendingError) as caught:
        made.all([REQUEST, replace(REQUEST, part="pair 1-2"), REQUEST])
    assert len(caught.value.asks) == 2


def test_a_clip_is_shown_as_frames_that_are_decoded_once(area: WorkArea, clips: list[str]) -> None:
    shown: list[int] = []

    def script(form: str, body: Any, before: int) -> Any:
        shown.append(images_of(body))
        return None

    with ScriptedServer(script) as server:
        made = asker(server, area)
        made.all([replace(REQUEST, shown=(Shown("The clip", clips[0]), Shown("Another", clips[1])))])
    assert shown == [6]
    assert len(list((Path(area.folder) / "frames").rglob("*.json"))) == 2  # type: ignore[arg-type]


def test_a_fence_around_json_is_taken_off() -> None:
    assert parse_form(Wording, f"```json\n{wording()}\n```") == Wording(**WORDING)


# --- stages -------------------------------------------------------------------------------------------------------------


def test_a_clip_that_is_not_clean_or_not_full_screen_is_lost(area: WorkArea, clips: list[str]) -> None:
    def script(form: str, body: Any, before: int) -> Any:
        text = text_of(body)
        changed = {"full_screen": "step 0" not in text, "clean": "step 1" not in text}
        return json.dumps({**DESCRIPTION, **changed})

    with ScriptedServer(script) as server:
        found = stage_of(Describe, asker(server, area))(video(clips))
    assert [clip.index for clip in found.clips] == [2]
    assert (found.clips[0].label, found.clips[0].description) == (DESCRIPTION["action"], DESCRIPTION["description"])
    assert [(lost.what, lost.reason) for lost in found.lost] == [("clip 0", "not full screen"), ("clip 1", "not clean")]


def test_skipped_steps_are_told_and_both_languages_are_asked_in_their_own(area: WorkArea, clips: list[str]) -> None:
    asked: list[str] = []

    def script(form: str, body: Any, before: int) -> Any:
        asked.append(text_of(body))
        return json.dumps(ZH) if "请写出" in asked[-1] else None

    film = video(clips)
    film.pairs = [Pair(0, 2, "procedural", skipped=["wash the rice"])]
    with ScriptedServer(script) as server:
        found = stage_of(Question, asker(server, area), ("en", "zh"))(film)
    assert [(pair.language, pair.caption) for pair in found.pairs] == [
        ("en", WORDING["caption"]),
        ("zh", ZH["caption"]),
    ]
    assert all("wash the rice" in text for text in asked)


def test_shots_without_a_tie_make_no_row_and_several_questions_make_several(area: WorkArea, clips: list[str]) -> None:
    count: list[int] = []

    def script(form: str, body: Any, before: int) -> Any:
        count.append(1)
        return json.dumps({**WHAT_IFS, "logical_tie": "none", "questions": []}) if len(count) == 1 else None

    with ScriptedServer(script) as server:
        found = stage_of(WhatIf, asker(server, area))(video(clips))
    assert [(pair.first, pair.number) for pair in found.pairs] == [(1, 0), (1, 1)]
    assert found.pairs[0].ties == {"place": "the same meadow", "order": "one goes on with what the other began"}
    assert [(lost.what, lost.reason) for lost in found.lost] == [("pair 0-1", "no logical tie")]


def worded(clips: list[str], **changed: str) -> Video:
    film = video(clips)
    film.pairs = [replace(film.pairs[0], **{**WORDING, **changed})]
    return film


def test_what_has_no_fault_passes_the_review(area: WorkArea, clips: list[str]) -> None:
    with ScriptedServer() as server:
        assert len(stage_of(Review, asker(server, area))(worded(clips)).pairs) == 1
        assert server.forms == {"verdict": 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"question": "Will a large rabbit walk out of its burrow and stretch under a tree?"},
        {"reasoning": "The second clip shows that a rabbit leaves its home in the morning."},
        {"caption": "一只大兔子走出洞口，在树下伸懒腰。"},
        {"question": "And?"},
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_checks_find_is_rewritten_once(changed: dict[str, str], area: WorkArea, clips: list[str]) -> None:
    with ScriptedServer() as server:
        found = stage_of(Review, asker(server, area))(worded(clips, **changed))
        assert len(found.pairs) == 1
        assert found.pairs[0].question == WORDING["question"]
        assert server.forms == {"wording": 1, "verdict": 1}


def test_what_the_checks_find_again_is_lost_without_a_reviewer(area: WorkArea, clips: list[str]) -> None:
    leaking = "Will a large rabbit walk out of its burrow and stretch under a tree?"
    with ScriptedServer(lambda form, body, before: wording(question=leaking)) as server:
        found = stage_of(Review, asker(server, area))(worded(clips, question=leaking))
        assert server.forms == {"wording": 1}
    assert not found.pairs
    assert [lost.reason for lost in found.lost] == ["gives away"]
    assert "100% of the caption's content stands in the question" in found.lost[0].told


@pytest.mark.parametrize(("fault", "reason"), [("gives_away", "gives away"), ("caption_mismatch", "caption mismatch")])
def test_what_the_reviewer_still_finds_after_one_rewriting_is_lost(
    fault: str, reason: str, area: WorkArea, clips: list[str]
) -> None:
    def script(form: str, body: Any, before: int) -> Any:
        if form == "verdict":
            return json.dumps({**VERDICT, fault: True, "why": "it names the rabbit"})
        return wording(reasoning="Another course of thought that leads on from what has just been finished here.")

    with ScriptedServer(script) as server:
        found = stage_of(Review, asker(server, area))(worded(clips))
        assert server.forms == {"verdict": 2, "wording": 1}
    assert not found.pairs
    assert [(lost.what, lost.reason) for lost in found.lost] == [("pair 0-1", reason)]
    assert "it names the rabbit" in found.lost[0].told


def test_a_video_survives_json(clips: list[str]) -> None:
    film = video(clips)
    assert video_of(json.loads(json.dumps(video_to_json(film)))) == film


def test_forms_ask_for_every_key_and_no_other() -> None:
    schema = Verdict.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(schema["properties"])
