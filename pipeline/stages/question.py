"""A person's question about a video of their own: what both models are asked, and what becomes of their answers.

One path for ``vans answer`` and ``vans serve``, so that the same bytes, question and seed have the same answer in both. Not
responsible for where the models run, or for files of answers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from actors.records import CompletionRequest, RenderRequest, Sample, derive_seed
from pipeline.config import RunConfig
from pipeline.config.stages import RenderSection
from pipeline.data.sources import video_limits, video_shape
from pipeline.data.video import decode_video
from pipeline.fleet.models import resolve_adapter, resolve_model
from pipeline.stages.requests import completion_request, render_request
from rewards.format import AnswerFormat


@dataclass(frozen=True)
class Said:
    """The thinker's answer to ``question``: the whole ``text``, and the ``caption`` and the ``thought`` in it."""

    question: str
    text: str
    caption: str
    thought: str = ""


@dataclass(frozen=True)
class Drawn:
    """What was said, and the clip that the artist drew of it."""

    said: Said
    frames: np.ndarray  # uint8 (T, H, W, 3)


@dataclass(frozen=True)
class Unanswered:
    """A question that has no future, and why."""

    question: str
    reason: str


def read_video(config: RunConfig, video: Path) -> Sample:
    """Decode ``video`` at the sizes the two models see. Raises DataError for a video without frames or a broken one.

    Its id, from which seeds are derived, is a digest of the file's bytes: what the file is called makes no difference.
    """
    shape, limits = video_shape(config), video_limits(config)
    seen, fps = shape.seen(video, limits)
    context = decode_video(video, shape.context, shape.height, shape.width, limits)
    with video.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()
    return Sample(name, "predictive", "", "", seen, context, fps=fps, context_frames=context)


def question_request(config: RunConfig, sample: Sample, question: str, seed: int) -> CompletionRequest:
    """Return what the thinker is asked: ``question`` about the video of ``sample``."""
    asked = replace(sample, question=question)
    return completion_request(asked, config.evaluate.text, derive_seed(seed, sample.id, question))


def caption_request(
    config: RunConfig, sample: Sample, caption: str, index: int, render: RenderSection, seed: int
) -> RenderRequest:
    """Return what the artist is asked: to draw ``caption`` after the video of ``sample``.

    All questions about a video begin with the same noise, so that their answers differ by what was said alone.
    """
    noise = derive_seed(seed, sample.id, "noise")
    return render_request(config, sample, caption, index, render, noise_seed=noise)


def captioned(question: str, text: str, answers: AnswerFormat) -> Said | Unanswered:
    """Return the thinker's ``text`` with its caption; where it has none there is nothing to draw."""
    answer = answers.parse(text)
    if answer is None:
        return Unanswered(question, f"the model's answer is not {answers}, so there is nothing to draw: {text!r}")
    return Said(question, text, answer.caption, answer.thought)


def split_model(config: RunConfig, role: Literal["vlm", "vdm"], given: str | None) -> tuple[str, str | None]:
    """Return (model folder, adapter folder or None): ``given`` may be a whole model or a PEFT adapter of the configured one."""
    base = getattr(config.models, role)
    adapter = getattr(config.models, f"{role}_adapter")
    if given is None:
        given = adapter
    elif not (Path(given).expanduser() / "adapter_config.json").is_file():
        return resolve_model(given, role), None
    model = resolve_model(base, role)
    return model, resolve_adapter(given, role, model)
