"""Rotary positions of a prompt's tokens, as vLLM computes them.

Responsible for one axis that counts up, and for the three axes (time, height, width) of M-RoPE, from what the processor says of
a prompt: its token types and its video's grid. Not responsible for which make of thinker has which (``actors.vlm.makes``).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from actors.failures import BadSampleError

_STEP = "second_per_grid_ts"  # a Qwen processor's name for the seconds of a time step


def one_axis(data: Mapping[str, Any], config: Any, engine_dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return (1, P) positions that count up from 0, and the one that follows: an ordinary language model's.

    ``data``: the processor's outputs for one prompt, tensors with a first axis of 1. ``config`` and ``engine_dtype`` are not used.
    """
    length = data["input_ids"].shape[1]
    return torch.arange(length)[None], length


def spaced_by_seconds(data: Mapping[str, Any], config: Any, engine_dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return (3, P) M-RoPE positions and the one that follows, where a video is one run of tokens and time is in seconds.

    ``data``: the processor's outputs for one prompt. ``config``: the model's, whose ``vision_config.tokens_per_second`` says how
    many positions a second has. ``engine_dtype``: what vLLM serves the model in.
    """
    vision = config.vision_config
    seconds = data.get(_STEP)
    interval = time_interval(
        None if seconds is None else float(seconds[0]), float(vision.tokens_per_second), engine_dtype
    )
    return mrope_positions(_types(data), data["video_grid_thw"], int(vision.spatial_merge_size), interval)


def step_by_step(data: Mapping[str, Any], config: Any, engine_dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return (3, P) M-RoPE positions and the one that follows, where each time step is a run of tokens behind a time stamp.

    ``data`` and ``config`` as in :func:`spaced_by_seconds`; ``engine_dtype`` is not used.
    """
    steps, height, width = data["video_grid_thw"][0].tolist()
    runs = torch.tensor([[1, height, width]]).repeat(steps, 1)
    return mrope_positions(_types(data), runs, int(config.vision_config.spatial_merge_size), None)


def _types(data: Mapping[str, Any]) -> Tensor:
    return torch.as_tensor(data["mm_token_type_ids"])[0].long()


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
