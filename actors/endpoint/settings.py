"""How an OpenAI-compatible endpoint is asked, and what a reply is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from actors.settings import FREE, Positive, Section
from cluster.errors import ConfigError
from cluster.harmless import redacted

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY_LENGTH = 64  # a longer "name" is a key that stands in the wrong place


class EndpointSection(Section):
    """A model behind an endpoint."""

    model: str = Field(..., min_length=1, description="The model's name at its endpoint.")
    base_url: str | None = Field(None, description="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    key_variable: str | None = Field(
        None,
        description="Name of the environment variable that holds the endpoint's key, on each node; null sends none.",
        json_schema_extra=FREE,
    )
    structured: Literal["json_schema", "json_object", "prompt"] = Field(
        "json_schema",
        description="How it is held to the form of an answer: json_schema (guided decoding), json_object, or by the prompt alone.",
    )
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

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the price of so many tokens."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


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
