"""Stages as a worker runs them, without Ray: what is kept, what waits, what ends a build, and both bundled recipes on real clips."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline
from cluster.errors import ConfigError
from pipeline.data.build.annotations import unannotated_videos
from pipeline.data.build.asking import ASKS, Asker
from pipeline.data.build.engine import _Request, _Waiting
from pipeline.data.build.models import EngineSection, ModelSection
from pipeline.data.build.procedural import Describe
from pipeline.data.build.recipe import StagePlan, load_recipe, plan_stages, stage_identity
from pipeline.data.build.rows import refusal, row_id
from pipeline.data.build.shared import Build
from pipeline.data.build.store import WorkArea
from pipeline.data.build.video import Clip, Pair, Video
from pipeline.data.build.worker import (
    FATAL,
    GOING,
    PENDING,
    UNFINISHED,
    SetupError,
    StageWorker,
    Task,
    Travel,
    table_of,
    travels_of,
)
from pipeline.data.real import packaged_clips
from tests.pipeline.data.build.stages import Faulty, Pieces, write_videos
from tests.scripted_server import ScriptedServer


def task(root: Path, kind: Any = Pieces, **changed: Any) -> Task:
    settings = changed.pop("settings", None) or kind.Settings()
    build = Build(root / "videos", WorkArea(root / "_build"))
    return Task("stage", kind, settings, "identity", build, **changed)


def passed(worker: StageWorker, travel: Travel) -> Travel:
    [found] = travels_of(worker(table_of([travel])))
    return found


@pytest.fixture
def film(tmp_path: Path) -> Video:
    write_videos(tmp_path / "videos", 1)
    return Video("v000", "v000.mp4")


def test_what_a_stage_made_is_not_made_again(film: Video, tmp_path: Path) -> None:
    first = passed(StageWorker(task(tmp_path)), Travel(film, "key"))
    shutil.rmtree(tmp_path / "videos")
    assert passed(StageWorker(task(tmp_path)), Travel(film, "key")).video == first.video
    other = passed(StageWorker(replace(task(tmp_path), identity="another recipe")), Travel(film, "key"))
    assert [lost.reason for lost in other.video.lost] == ["unusable"]


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [("setup", SetupError, "stages.stage cannot be set up: no weights"), ("config", ConfigError, "refuses the key")],
)
def test_what_ends_the_build_comes_in_its_turn(how: str, error: Any, told: str, film: Video, tmp_path: Path) -> None:
    worker = StageWorker(task(tmp_path, Faulty, settings=Faulty.Settings(how=how)))
    found = passed(worker, Travel(film, "key"))
    assert found.state == FATAL
    assert isinstance(found.error(), error)
    assert told in str(found.error())
    assert passed(StageWorker(task(tmp_path)), found).video.clips == []  # it goes through no further stage


def test_a_spent_budget_leaves_the_video_as_it_was(film: Video, tmp_path: Path) -> None:
    class Empty:
        def allows(self) -> bool:
            return False

        def add(self, tokens: int, cost: float) -> None:
            raise AssertionError

    made = passed(StageWorker(task(tmp_path)), Travel(film, "key"))
    from pipeline.data.build.procedural import Question

    with ScriptedServer() as server:
        model = ModelSection(model="scripted", base_url=server.base_url)
        asking = task(
            tmp_path, Question, settings=Question.Settings(model="m"), model=model, model_name="m", meter=Empty()
        )
        found = passed(StageWorker(asking), made)
        assert found.state == UNFINISHED
        assert found.video == made.video
        assert not server.seen


def test_what_an_engine_is_to_answer_travels_to_it_and_back(film: Video, tmp_path: Path) -> None:
    from pipeline.data.build.procedural import Question

    made = passed(StageWorker(task(tmp_path)), Travel(film, "key"))
    model = ModelSection(model="/models/vlm", engine=EngineSection(), frames=2, frame_side=32)
    asking = task(tmp_path, Question, settings=Question.Settings(model="m"), model=model, model_name="m", last=True)
    waiting = passed(StageWorker(asking), made)
    assert waiting.state == PENDING
    area = asking.build.store
    rows = _Waiting("m", model, area)(table_of([waiting])).to_pylist()
    assert len(rows) == 2
    for row in rows:
        area.write(ASKS, row["key"], {"text": "nonsense", "fault": "", "tokens_in": 5, "tokens_out": 1, "seconds": 0.1})
    again = passed(StageWorker(asking), made)
    repairs = _Waiting("m", model, area)(table_of([again])).to_pylist()
    assert again.state == PENDING
    assert {row["key"] for row in repairs}.isdisjoint(row["key"] for row in rows)
    for row in repairs:
        area.write(ASKS, row["key"], {"text": "[]", "fault": "", "tokens_in": 5, "tokens_out": 1, "seconds": 0.1})
    done = passed(StageWorker(asking), made)
    assert done.state == GOING
    assert [(lost.what, lost.reason, lost.raw) for lost in done.video.lost] == [
        ("pair 0-1", "wrong form", "[]"),
        ("pair 1-2", "wrong form", "[]"),
    ]
    assert done.spent["stage"]["asks"] == 4
    assert not _Waiting("m", model, area)(table_of([done])).num_rows


@pytest.mark.slow
def test_an_engine_is_shown_each_frame_at_its_place(film: Video, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    made = passed(StageWorker(task(tmp_path)), Travel(film, "key"))
    folder = Path(pipeline.__file__).parent / "assets" / "tiny" / "vlm"
    model = ModelSection(model=str(folder), engine=EngineSection(), frames=2, frame_side=32)
    asking = task(tmp_path, Describe, settings=Describe.Settings(model="m"), model=model, model_name="m")
    row = _Waiting("m", model, asking.build.store)(table_of([passed(StageWorker(asking), made)])).to_pylist()[0]
    asked = _Request(model)(row)
    assert [picture.size for picture in asked["multimodal_data"]["image"]] == [(32, 32), (32, 32)]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
    assert text.count(processor.image_token) == 2
    assert "what has changed at the end" in text


@pytest.mark.slow
def test_real_shots_become_rows_by_the_bundled_recipe(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    [bikes] = [clip for clip in packaged_clips() if Path(clip).name == "bikes.mp4"]
    shutil.copy(bikes, tmp_path / "videos")
    with ScriptedServer() as server:
        overrides = [f"models.{name}.base_url={server.base_url}" for name in ("writer", "reviewer")]
        overrides += [f"models.{name}.model=scripted" for name in ("writer", "reviewer")]
        recipe = load_recipe("predictive", overrides)
        build = Build(tmp_path / "videos", WorkArea(tmp_path / "_build"))

        def worker(plan: StagePlan) -> StageWorker:
            model = recipe.models[plan.model] if plan.model else None
            identity = stage_identity(recipe, plan)
            return StageWorker(
                Task(plan.name, plan.stage, plan.settings, identity, build, plan.model or "", model, threads=4)
            )

        [video] = unannotated_videos(tmp_path / "videos")
        travel = Travel(video, "key")
        for plan in plan_stages(recipe):
            travel = passed(worker(plan), travel)
        assert server.forms == {"whatifs": 4, "verdict": 8}
    video = travel.video
    assert [refusal(video, pair) for pair in video.pairs] == [None] * 8
    assert row_id(video, video.pairs[1]) == "bikes/0-1#1"
    assert travel.spent["review"]["tokens_in"] == 800


def test_why_a_pair_is_no_row() -> None:
    film = Video("a", "a.mp4", clips=[Clip(0, 0, 1, stored="x"), Clip(1, 1, 2)])
    good = {"question": "What now?", "caption": "A cook stirs.", "reasoning": "So it goes."}
    cases = {
        "no question": Pair(0, 1, "procedural"),
        "caption": Pair(0, 1, "procedural", **{**good, "caption": "…"}),
        "tags": Pair(0, 1, "procedural", **{**good, "reasoning": "It is <ans> this"}),
        "not cut": Pair(0, 1, "procedural", **good),
        "no clip": Pair(0, 7, "procedural", **good),
    }
    for reason, pair in cases.items():
        lost = refusal(film, pair)
        assert lost is not None
        assert lost.reason == reason
    assert row_id(film, Pair(0, 1, "predictive", 2, language="zh")) == "a/0-1#2@zh"


def test_an_asker_of_a_stage_without_a_model_is_none(tmp_path: Path) -> None:
    assert task(tmp_path).asker() is None
    made = task(tmp_path, model=ModelSection(model="x", base_url="http://127.0.0.1:1/v1"), model_name="x").asker()
    assert isinstance(made, Asker)
