"""What an endpoint is sent, and an answer of a fixed form: the body of a chat completion, pictures in it, and JSON that comes back.

Pure. An engine that is no endpoint takes the same messages.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from actors.endpoint.settings import EndpointSection

_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)


class Form(BaseModel):
    """An answer's form: a JSON object with exactly these keys."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


F = TypeVar("F", bound=Form)


def request_body(
    model: EndpointSection,
    messages: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    *,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Return the body of a chat completion whose answer is held to ``schema`` as ``model.structured`` says."""
    body: dict[str, Any] = {
        "model": model.model,
        "messages": list(messages),
        "temperature": model.temperature,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    if model.structured == "json_schema":
        named = {"name": str(schema.get("title", "answer")).lower(), "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    elif model.structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def parse_form(form: type[F], text: str) -> F:
    """Return ``text``, JSON with or without a fence around it, as ``form``.

    Raises json.JSONDecodeError where it is no JSON, ValueError that names the key where it has another form.
    """
    fenced = _FENCE.match(text)
    try:
        values = json.loads(fenced[1] if fenced else text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    try:
        return form.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where or 'the answer'}: {first['msg']}") from error


def picture_part(jpeg: str) -> dict[str, Any]:
    """Return the part of a message that shows a picture; ``jpeg`` is :func:`jpeg_of`'s."""
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}}


def jpeg_of(picture: Image.Image) -> str:
    """Return ``picture`` as base64 of JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()
