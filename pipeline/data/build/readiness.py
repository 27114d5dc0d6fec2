"""Whether the models of a recipe are there and take what they will be asked, found out before the first video."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from actors.endpoint.client import Endpoint
from actors.endpoint.forms import Form, jpeg_of, picture_part
from actors.endpoint.settings import AskFailedError
from cluster.errors import ConfigError
from pipeline.data.build.models import ModelSection
from pipeline.data.video import encode_mp4

_SIDE, _FRAMES = 64, 4


class _Colour(Form):
    colour: str


def ready_models(
    models: Mapping[str, ModelSection], shown: Mapping[str, bool], say: Callable[[str], Any]
) -> dict[str, ModelSection]:
    """Return ``models`` as they can be asked; ``shown``: those that stages ask → whether they are shown clips.

    A model that refuses video is shown frames instead, and ``say`` gets the sentence about it. Raises ConfigError with the cure for
    an endpoint that is not there, a key that is missing or refused, and a model that cannot see or does not keep to a form.
    """
    ready = dict(models)
    for name, sees in shown.items():
        where, model = f"models.{name}", models[name]
        ready[name] = (
            _ready_endpoint(where, model, sees, say) if model.engine is None else _ready_engine(where, model, say)
        )
    return ready


def _ready_engine(where: str, model: ModelSection, say: Callable[[str], Any]) -> ModelSection:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{where}.engine: vLLM is not installed: `pip install 'vans-on-ray[gpu]'`, or set base_url instead"
        )
    if not (Path(model.model) / "config.json").is_file():
        raise ConfigError(f"{where}.model={model.model}: no model folder there (it has no config.json)")
    if model.sees == "video":
        say(f"{where}: an engine is shown each clip as {model.frames} images, not as video")
        return model.model_copy(update={"sees": "images"})
    return model


def _ready_endpoint(where: str, model: ModelSection, sees: bool, say: Callable[[str], Any]) -> ModelSection:
    endpoint = Endpoint(where, model)
    try:
        endpoint.check()
        form = _form(model)
        refused = endpoint.takes(
            _body(model, _video() if model.sees == "video" else _image(), form) if sees else _body(model, [], form)
        )
        if not refused:
            return model
        if plain := endpoint.takes(_body(model, [], {})):
            raise ConfigError(plain)
        if endpoint.takes(_body(model, [], form)):
            raise ConfigError(
                f"{where}.structured={model.structured}: the endpoint does not take it ({refused}); set json_object, or prompt, which "
                "every model takes"
            )
        if model.sees == "video" and not endpoint.takes(_body(model, _image(), form)):
            say(f"{where}: {model.model} does not take video, so it is shown each clip as {model.frames} images")
            return model.model_copy(update={"sees": "images"})
        raise ConfigError(f"{where}.model={model.model}: it cannot see ({refused}); choose a model that takes images")
    except AskFailedError as error:
        raise ConfigError(
            f"{where}.base_url={model.base_url}: the endpoint does not answer an ask: {error.told}"
        ) from error
    finally:
        endpoint.close()


def _form(model: ModelSection) -> dict[str, Any]:
    if model.structured == "json_schema":
        schema = {"name": "colour", "schema": _Colour.model_json_schema(), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": {"type": "json_object"}} if model.structured == "json_object" else {}


def _body(model: ModelSection, shown: list[dict[str, Any]], form: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "text", "text": 'Name a colour of what is shown, or any. Answer with JSON: {"colour": "…"}'}
    messages = [{"role": "user", "content": [*shown, text]}]
    return {"model": model.model, "messages": messages, "temperature": 0.0, "max_tokens": 32, **form}


def _image() -> list[dict[str, Any]]:
    return [picture_part(jpeg_of(Image.new("RGB", (_SIDE, _SIDE), (200, 40, 40))))]


def _video() -> list[dict[str, Any]]:
    frames = np.full((_FRAMES, _SIDE, _SIDE, 3), 128, np.uint8)
    data = encode_mp4(frames, 4.0, near_lossless=False)
    return [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}]
