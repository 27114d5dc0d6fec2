"""Clips as arrays and as tensors, and which frames of a clip condition the next one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from actors.failures import BadSampleError
from actors.vdm.settings import ConditioningSection


def select_reference_frames(frames: np.ndarray, n: int) -> np.ndarray:
    """Return n frames spread uniformly over ``frames`` (T, H, W, 3), the last one included; repeats where T < n."""
    if n and not len(frames):
        raise BadSampleError(f"a video without frames has no {n} reference frames")
    picks = np.linspace(0, len(frames) - 1, n) if n > 1 else np.full(n, len(frames) - 1)
    return np.ascontiguousarray(frames[np.rint(picks).astype(int)])


def conditioning_frames(context: np.ndarray, n: int, how: ConditioningSection) -> np.ndarray:
    """Return the frames of the input ``context`` (T, H, W, 3) that the artist is conditioned on: ``n`` of them, or the whole clip."""
    return context if how.references == "clip" else select_reference_frames(context, n)


def frames_to_video(frames: np.ndarray) -> Tensor:
    """Return uint8 (..., T, H, W, 3) as float32 (..., 3, T, H, W) in -1..1."""
    if frames.dtype != np.uint8 or frames.shape[-1] != 3:
        raise BadSampleError(f"frames must be uint8 (..., H, W, 3) RGB, got {frames.dtype} {frames.shape}")
    return torch.from_numpy(np.array(frames)).movedim(-1, -4).float() / 127.5 - 1.0


def video_to_frames(video: Tensor) -> np.ndarray:
    """Return float (..., 3, T, H, W) in -1..1 as uint8 (..., T, H, W, 3), rounded as diffusers rounds."""
    unit = (video.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).movedim(-4, -1).cpu().numpy()
