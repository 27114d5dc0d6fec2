"""From a question and frames to what the VLM's forward takes: token ids, patches, and three-axis rotary positions.

Responsible for: what of a :class:`VideoQuestion` the model gets, for the engine and the learner alike; one encoded prompt
per question, cached; and its positions as vLLM computes them. Not responsible for: the prompt's wording
(``actors.vlm.prompt``), completions, batching or the model (``actors.vlm.policy``).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.failures import BadSampleError
from actors.policy.protocol import torch_dtype
from actors.records import VideoQuestion
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
    token_types: Tensor  # (P,) int64: 0 text, 2 video
    positions: Tensor  # (3, P) int64: time, height, width
    next_position: int  # rotary position of the first completion token, on all three axes
    pixel_values: Tensor  # (patches, values per patch) float32
    grid_thw: Tensor  # (1, 3) int64


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


def time_interval(seconds: float | None, tokens_per_second: float, engine_dtype: torch.dtype) -> float:
    """Return the rotary positions per time step of Qwen2.5-VL, as vLLM has them (``qwen2_5_vl.iter_mm_grid_thw``).

    vLLM casts whatever floats a processor returns to the model's dtype, seconds per step among them. Positions are
    floored afterwards, so in bfloat16 many clips have others than the exact seconds give.

    ``seconds``: duration of a time step; None is 1, as in vLLM.
    """
    rounded = torch.tensor(1.0 if seconds is None else seconds, dtype=torch.float32).to(engine_dtype).item()
    return rounded * tokens_per_second


def mrope_positions(token_types: Tensor, grids: Tensor, merge: int, time_interval: float | None) -> tuple[Tensor, int]:
    """Return rotary positions (3, P) of a prompt and the position that follows it.

    Text counts up on all three axes; a video's tokens lie on their (t, h, w) grid, and the text after a video goes on
    at the largest position used + 1, which is Qwen2-VL's definition (arXiv 2409.12191, M-RoPE) and what vLLM does.
    transformers 5.19 goes on at ``max(h, w) // merge`` for Qwen2.5-VL, whatever the video's length, so its
    log-probabilities differ by 1e-3.

    Args:
        token_types: (P,), 0 for text, 2 for video tokens.
        grids: (runs, 3) patch grid (t, h, w) of each run of video tokens.
        merge: spatial merge size; the language model sees h // merge × w // merge tokens per time step.
        time_interval: positions per time step (Qwen2.5-VL: tokens per second × seconds per step); None means 1.
    """
    parts: list[Tensor] = []
    start, run = 0, 0
    for kind, group in groupby(token_types.tolist()):
        length = len(list(group))
        if kind == 0:
            part = torch.arange(length).expand(3, -1)
        else:
            t, h, w = grids[run].tolist()
            run += 1
            axes = torch.meshgrid(torch.arange(t), torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
            part = torch.stack(axes).reshape(3, -1)
            if time_interval is not None:
                part = torch.stack([(part[0].double() * time_interval).long(), part[1], part[2]])
            if part.shape[1] != length:
                raise BadSampleError(
                    f"a run of {length} video tokens doesn't fill its grid {t}x{h}x{w} (merge {merge})"
                )
        parts.append(part + start)
        start = int(parts[-1].max()) + 1
    return torch.cat(parts, dim=1), start


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
        self._merge = int(config.vision_config.spatial_merge_size)
        # Qwen2.5-VL spaces time by seconds; Qwen3-VL writes timestamps, with a run of tokens per time step between.
        self._tokens_per_second = getattr(config.vision_config, "tokens_per_second", None)
        self._engine_dtype = torch_dtype(engine_dtype)
        self._cache: OrderedDict[bytes, EncodedPrompt] = OrderedDict()
        self._cache_size = cache_size
        self.made = self.asked = 0  # prompts processed, and prompts asked for

    def encode(self, prompts: Sequence[VideoQuestion]) -> list[EncodedPrompt]:
        """Return one :class:`EncodedPrompt` per item; equal items share one, and missing ones are processed together.

        Raises:
            BadSampleError: frames or question cannot be used.
        """
        keys = [_digest(p) for p in prompts]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {key: p for key, p in zip(keys, prompts, strict=True) if key not in found}
        self.asked, self.made = self.asked + len(keys), self.made + len(missing)
        if missing:
            found.update(zip(missing, self._process(list(missing.values())), strict=True))
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def _process(self, prompts: list[VideoQuestion]) -> list[EncodedPrompt]:
        shown = [video_prompt(self.processor, prompt, self.prompt) for prompt in prompts]
        data = self.processor(
            text=[p.text for p in shown],
            videos=[p.frames for p in shown],
            video_metadata=[p.metadata for p in shown],
            do_sample_frames=False,
        )
        grids = torch.as_tensor(data["video_grid_thw"]).long()
        pixels = torch.as_tensor(data["pixel_values_videos"]).float().split(grids.prod(dim=1).tolist())
        seconds = data.get("second_per_grid_ts", [None] * len(prompts))
        return [
            self._encoded(data["input_ids"][i], data["mm_token_type_ids"][i], pixels[i], grids[i], seconds[i])
            for i in range(len(prompts))
        ]

    def _encoded(
        self, ids: list[int], types: list[int], pixels: Tensor, grid: Tensor, seconds: float | None
    ) -> EncodedPrompt:
        token_types = torch.tensor(types, dtype=torch.long)
        if self._tokens_per_second is None:
            runs, interval = torch.tensor([[1, grid[1], grid[2]]]).repeat(int(grid[0]), 1), None
        else:
            runs, interval = grid[None], time_interval(seconds, self._tokens_per_second, self._engine_dtype)
        positions, following = mrope_positions(token_types, runs, self._merge, interval)
        return EncodedPrompt(
            input_ids=torch.tensor(ids, dtype=torch.long),
            token_types=token_types,
            positions=positions,
            next_position=following,
            pixel_values=pixels.clone(),
            grid_thw=grid[None].clone(),
        )


def _digest(prompt: VideoQuestion) -> bytes:
    frames = np.ascontiguousarray(prompt.frames)
    head = f"{prompt.question}\x1f{prompt.fps!r}\x1f{frames.shape}\x1f{frames.dtype}".encode()
    return hashlib.blake2b(head + b"\x1f" + frames.tobytes(), digest_size=16).digest()
