"""From a question and frames to what the VLM's forward takes: token ids, pixels, and rotary positions.

Responsible for: what of a :class:`VideoQuestion` the model gets, for the engine and the learner alike; and one encoded prompt
per question, cached. Tokens and pixels are the processor's, positions the make's (``actors.vlm.makes``). Not responsible for: the
prompt's wording (``actors.vlm.prompt``), completions, batching or the model (``actors.vlm.policy``).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from actors.failures import BadSampleError
from actors.policy.protocol import torch_dtype
from actors.records import VideoQuestion
from actors.vlm.makes import make_of
from actors.vlm.prompt import render_prompt
from actors.vlm.settings import PROMPT, PromptSection


@dataclass(frozen=True, eq=False)
class VideoPrompt:
    """A :class:`VideoQuestion` as processor and vLLM take it: every frame is shown, none is sampled away."""

    text: str  # chat text with one video placeholder
    frames: np.ndarray  # uint8 (T, H, W, 3), writable
    metadata: dict[str, Any]  # fields of transformers' VideoMetadata


def video_prompt(processor: Any, asked: VideoQuestion, prompt: PromptSection = PROMPT) -> VideoPrompt:
    """Return what the model gets of ``asked``. SFT, learner and engine have their input from here alone.

    Raises:
        BadSampleError: frames, rate or question cannot be used.
    """
    check_frames(asked.frames)
    if not (math.isfinite(asked.fps) and asked.fps > 0):
        raise BadSampleError(f"the input video has fps={asked.fps}; it must be a number of frames per second above 0")
    count = len(asked.frames)
    metadata = {
        "fps": float(asked.fps),
        "duration": count / asked.fps,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
    }
    return VideoPrompt(render_prompt(processor, asked.question, prompt), writable(asked.frames), metadata)


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One prompt of P tokens, ready to be joined with a completion."""

    input_ids: Tensor  # (P,) int64
    positions: Tensor  # (A, P) int64; A is 1, or 3 for time, height and width
    next_position: int  # rotary position of the first completion token, on all axes
    visual: dict[str, Tensor]  # what the model takes of the video, by the processor's names; one row or more each


_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "second_per_grid_ts")
"""A processor's outputs that say which tokens there are and where: the rest is the video."""


def check_frames(frames: np.ndarray) -> None:
    """Raise :class:`BadSampleError` unless ``frames`` is a non-empty uint8 (T, H, W, 3) array of at least 2 frames."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise BadSampleError(
            f"input frames must be uint8 (T, H, W, 3) and not empty, got {frames.dtype} {frames.shape}"
        )
    if len(frames) < 2:
        raise BadSampleError("the input video has 1 frame; the VLM's temporal patches need at least 2")


def writable(frames: np.ndarray) -> np.ndarray:
    """Return ``frames``, copied if they lie read-only in Ray's object store (torch warns of sharing such memory)."""
    return frames if frames.flags.writeable else frames.copy()


class PromptEncoder:
    """Encodes prompts through the model's own processor; what is in the cache is not processed again."""

    def __init__(
        self,
        processor: Any,
        config: Any,
        cache_size: int = 64,
        engine_dtype: str = "float32",
        prompt: PromptSection = PROMPT,
    ):
        """``config`` is the model's. ``engine_dtype`` is what vLLM serves it in: its positions depend on it."""
        self.processor, self.prompt = processor, prompt
        self._config, self._make = config, make_of(config)
        self._engine_dtype = torch_dtype(engine_dtype)
        self._cache: OrderedDict[bytes, EncodedPrompt] = OrderedDict()
        self._cache_size = cache_size
        self.made = self.asked = 0  # prompts processed, and prompts asked for

    def encode(self, prompts: Sequence[VideoQuestion]) -> list[EncodedPrompt]:
        """Return one :class:`EncodedPrompt` per item; equal items share one.

        Raises:
            BadSampleError: frames or question cannot be used.
        """
        keys = [_digest(p) for p in prompts]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {key: p for key, p in zip(keys, prompts, strict=True) if key not in found}
        self.asked, self.made = self.asked + len(keys), self.made + len(missing)
        found.update((key, self._process(p)) for key, p in missing.items())
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def _process(self, asked: VideoQuestion) -> EncodedPrompt:
        shown = video_prompt(self.processor, asked, self.prompt)
        # One by one: of some makes, videos of several lengths are no tensor.
        data = self.processor(
            text=[shown.text],
            videos=[shown.frames],
            video_metadata=[shown.metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        positions, following = self._make.positions(data, self._config, self._engine_dtype)
        visual = {k: v for k, v in data.items() if k not in _OF_TEXT and isinstance(v, Tensor)}
        return EncodedPrompt(
            input_ids=data["input_ids"][0].long(),
            positions=positions,
            next_position=following,
            visual={k: v.float() if v.is_floating_point() else v for k, v in visual.items()},
        )


def _digest(prompt: VideoQuestion) -> bytes:
    frames = np.ascontiguousarray(prompt.frames)
    head = f"{prompt.question}\x1f{prompt.fps!r}\x1f{frames.shape}\x1f{frames.dtype}".encode()
    return hashlib.blake2b(head + b"\x1f" + frames.tobytes(), digest_size=16).digest()
