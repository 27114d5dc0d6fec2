"""The models that a build asks: how they are set, and what an ask and its reply are.

A model stands behind an OpenAI-compatible endpoint (``endpoint``) or is a folder that vLLM serves within the cluster (``engine``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.endpoint.settings import EndpointSection
from actors.settings import FREE, Positive, Section
from pipeline.data.build.store import digest_of


class EngineSection(Section):
    """vLLM within the cluster, through ``ray.data.llm``."""

    replicas: Positive = Field(1, description="Engines side by side.")
    cpus: float = Field(1.0, gt=0, description="CPUs of an engine.")
    gpus: float = Field(0.0, ge=0, description="GPUs of an engine; 0 is vLLM's CPU build.")
    batch: Positive = Field(16, description="Asks that an engine is given at a time.")
    arguments: dict[str, Any] = Field({}, description="Further engine arguments of vLLM, such as max_model_len.")


class ModelSection(EndpointSection):
    """A model by name: its name at ``base_url``, or the folder of weights that ``engine`` serves. One of the two is set."""

    engine: EngineSection | None = Field(None, description="vLLM within the cluster.", json_schema_extra=FREE)
    sees: Literal["video", "images"] = Field(
        "images",
        description="How it is shown a clip: as mp4 (`video_url`, where the endpoint has it), or as frames, each an image. One that "
        "refuses video is shown images, and the log says so.",
    )
    frames: Positive = Field(8, description="Frames of a clip that it is shown, evenly spaced, both ends among them.")
    frame_side: int = Field(448, ge=16, description="Pixels of the longer side of a frame.")

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        if (self.base_url is None) == (self.engine is None):
            raise ValueError("set either base_url (an endpoint) or engine (vLLM within the cluster)")
        return self

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
