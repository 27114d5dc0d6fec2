"""What is found out about a model before the first video, each with its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cluster.errors import ConfigError
from pipeline.data.build.models import EngineSection, ModelSection
from pipeline.data.build.readiness import ready_models
from tests.scripted_server import ScriptedServer


def ready(server: ScriptedServer, **settings: Any) -> tuple[ModelSection, list[str]]:
    said: list[str] = []
    model = ModelSection(model="scripted", base_url=server.base_url, **{"tries": 1, **settings})
    return ready_models({"writer": model}, {"writer": True}, said.append)["writer"], said


def refuses(*words: str) -> Any:
    """Return the script of a server that takes no request with one of ``words`` in it."""

    def script(form: str, body: Any, before: int) -> Any:
        text = json.dumps(body)
        found = next((word for word in words if word in text), None)
        return web.json_response({"error": {"message": f"unsupported: {found}"}}, status=400) if found else None

    return script


def test_a_model_that_takes_video_is_shown_video() -> None:
    with ScriptedServer() as server:
        model, said = ready(server, sees="video")
    assert model.sees == "video"
    assert said == []


def test_a_model_that_refuses_video_is_shown_images_and_the_log_says_so() -> None:
    with ScriptedServer(refuses("video_url")) as server:
        model, said = ready(server, sees="video")
    assert model.sees == "images"
    assert said == ["models.writer: scripted does not take video, so it is shown each clip as 8 images"]


def test_a_model_that_cannot_see_is_refused_unless_it_is_shown_nothing() -> None:
    with ScriptedServer(refuses("video_url", "image_url")) as server:
        for form in ("video", "images"):
            with pytest.raises(
                ConfigError, match=r"models.writer.model=scripted: it cannot see .* choose a model that takes images"
            ):
                ready(server, sees=form)


def test_a_model_that_is_asked_by_text_alone_need_not_see() -> None:
    with ScriptedServer(refuses("image_url")) as server:
        said: list[str] = []
        model = ModelSection(model="scripted", base_url=server.base_url)
        assert ready_models({"writer": model}, {"writer": False}, said.append) == {"writer": model}


def test_an_endpoint_without_schemas_is_told_what_to_set() -> None:
    with ScriptedServer(refuses("json_schema")) as server:
        with pytest.raises(ConfigError, match=r"models.writer.structured=json_schema: .* set json_object, or prompt"):
            ready(server)
        assert ready(server, structured="prompt")[1] == []


def test_an_endpoint_that_takes_nothing_is_told_with_its_own_words() -> None:
    with (
        ScriptedServer(refuses("messages")) as server,
        pytest.raises(ConfigError, match=r"does not take such an ask .*unsupported"),
    ):
        ready(server)


def test_an_endpoint_that_answers_nothing_but_errors() -> None:
    with (
        ScriptedServer(lambda *_: web.Response(status=503)) as server,
        pytest.raises(ConfigError, match="does not answer an ask"),
    ):
        ready(server)


def test_an_engine_needs_the_folder_of_its_model(tmp_path: Path) -> None:
    model = ModelSection(model=str(tmp_path / "qwen"), engine=EngineSection(), sees="video")
    with pytest.raises(ConfigError, match=r"no model folder there \(it has no config.json\)"):
        ready_models({"m": model}, {"m": True}, print)
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text("{}")
    said: list[str] = []
    assert ready_models({"m": model}, {"m": True}, said.append)["m"].sees == "images"
    assert said == ["models.m: an engine is shown each clip as 8 images, not as video"]
