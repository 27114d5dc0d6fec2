"""The models that a build asks: how they are set, and what an ask and its reply are.

A model stands behind an OpenAI-compatible endpoint (``endpoint``) or is a folder that vLLM serves within the cluster (``engine``).
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.settings import FREE, Positive, Section
from cluster.errors import ConfigError
from pipeline.data.build.store import digest_of
from pipeline.support.harmless import redacted

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY_LENGTH = 64  # a longer "name" is a key that stands in the wrong place


class EngineSection(Section):
    """vLLM within the cluster, through ``ray.data.llm``."""

    replicas: Positive = Field(1, description="Engines side by side.")
    cpus: float = Field(1.0, gt=0, description="CPUs of an engine.")
    gpus: float = Field(0.0, ge=0, description="GPUs of an engine; 0 is vLLM's CPU build.")
    batch: Positive = Field(16, description="Asks that an engine is given at a time.")
    arguments: dict[str, Any] = Field({}, description="Further engine arguments of vLLM, such as max_model_len.")


class ModelSection(Section):
    """A model by name. Exactly one of ``base_url`` and ``engine`` is set."""

    model: str = Field(
        ..., min_length=1, description="The model's name at its endpoint; of an engine the folder of its weights."
    )
    base_url: str | None = Field(None, description="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    key_variable: str | None = Field(
        None,
        description="Name of the environment variable that holds the endpoint's key, on each node; null sends none.",
        json_schema_extra=FREE,
    )
    engine: EngineSection | None = Field(None, description="vLLM within the cluster.", json_schema_extra=FREE)
    sees: Literal["video", "images"] = Field(
        "images",
        description="How it is shown a clip: as mp4 (`video_url`, where the endpoint has it), or as frames, each an image. One that "
        "refuses video is shown images, and the log says so.",
    )
    structured: Literal["json_schema", "json_object", "prompt"] = Field(
        "json_schema",
        description="How it is held to the form of an answer: json_schema (guided decoding), json_object, or by the prompt alone.",
    )
    frames: Positive = Field(8, description="Frames of a clip that it is shown, evenly spaced, both ends among them.")
    frame_side: int = Field(448, ge=16, description="Pixels of the longer side of a frame.")
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature.")
    max_tokens: Positive = Field(
        1024, description="New tokens of an answer; an answer cut short is asked once more with twice."
    )
    concurrency: Positive = Field(8, description="Asks at a time, of all workers together.", json_schema_extra=FREE)
    timeout_s: float = Field(120.0, gt=0, description="Longest wait for an answer.", json_schema_extra=FREE)
    tries: Positive = Field(
        5, description="Times that an ask is sent where the server fails (429, 5xx, no answer).", json_schema_extra=FREE
    )
    longest_wait_s: float = Field(
        60.0,
        ge=0,
        description="Longest wait before the next try; a longer Retry-After ends the ask.",
        json_schema_extra=FREE,
    )
    price_in: float = Field(0.0, ge=0, description="Price of a million tokens of prompts.", json_schema_extra=FREE)
    price_out: float = Field(0.0, ge=0, description="Price of a million new tokens.", json_schema_extra=FREE)

    @field_validator("key_variable")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and (not _VARIABLE.fullmatch(name) or len(name) > _KEY_LENGTH):
            raise ValueError(
                "give the name of an environment variable, such as OPENAI_API_KEY; what stands here is none, and a key "
                "itself must not stand in a recipe"
            )
        return name

    @field_validator("base_url")
    @classmethod
    def _an_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if redacted(url) != url:
            raise ValueError("holds a password, which would be logged; name the key's variable with key_variable")
        if not url.startswith(("http://", "https://")):
            raise ValueError("an endpoint begins with http:// or https://, and ends as a rule with /v1")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        if (self.base_url is None) == (self.engine is None):
            raise ValueError("set either base_url (an endpoint) or engine (vLLM within the cluster)")
        return self

    def key(self, where: str) -> str | None:
        """Return the endpoint's key, None where it has none; raises ConfigError that begins with ``where``."""
        if self.key_variable is None:
            return None
        if not (value := os.environ.get(self.key_variable, "").strip()):
            raise ConfigError(
                f"{where}.key_variable: the environment has no {self.key_variable}: `export {self.key_variable}=…` before the "
                "command, and on each node of a cluster before `ray start`"
            )
        return value

    @property
    def identity(self) -> list[Any]:
        """What answers depend on, beside the prompt."""
        return [
            self.model,
            self.base_url or "engine",
            self.sees,
            self.structured,
            self.frames,
            self.frame_side,
            self.temperature,
        ]

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the price of so many tokens."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass(frozen=True)
class Shown:
    """A clip that a prompt shows, and what it is called there."""

    label: str
    clip: str  # its name in the store


@dataclass(frozen=True)
class Ask:
    """One question to a model. Equal asks have equal keys, and are sent once."""

    stage: str
    model: str  # its name in the recipe
    system: str
    text: str
    shown: tuple[Shown, ...]
    schema: dict[str, Any]  # JSON schema of the answer
    max_tokens: int
    seed: int
    attempt: int = 0

    def key(self, model: ModelSection) -> str:
        """Return the sha256 of all that the answer depends on."""
        return digest_of("ask", asdict(self), model.identity)


Fault = Literal["refused", "truncated", "empty", ""]


@dataclass(frozen=True)
class Reply:
    """What a model answered."""

    text: str
    fault: Fault = ""  # why it is no whole answer
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


class AskFailedError(Exception):
    """The server did not answer an ask within its tries. ``reason`` is one of few words, ``told`` a sentence."""

    def __init__(self, reason: str, told: str) -> None:
        super().__init__(told)
        self.reason, self.told = reason, told
