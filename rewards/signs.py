"""Signs of reward hacking, logged at every step and never rewarded: motion, copying, sharpness, saturation,
correlations. When one of them goes too far is decided in ``rewards.alarms``.

CLIP-V alone is content with a still picture of the right scene; these numbers are not. Frames are uint8 (T, H, W, 3)
RGB. Each sign is relative to ground truth, so that 1 (ratios) or 0 (differences) means "like the real thing".
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.errors import RewardError
from rewards.similarity import normalised, resample_frames

Frames = NDArray[np.uint8]

STILL = 1e-4
"""Added to both sides of the motion ratio, a fortieth of a grey level: two still clips move alike."""

NOISE = 8
"""Changes of a pixel up to this many grey levels are no motion: sensors and video decoders flicker by as much."""


def motion(frames: Frames) -> float:
    """Return the mean |difference| of consecutive frames, 0..1, over the changes above ``NOISE``; one frame has none.

    Without that limit a still picture that comes out of a video decoder seems to move: on the bundled artist's VAE its
    flicker over the whole picture was nine tenths of the true motion of two small shapes.
    """
    if len(frames) < 2:
        return 0.0
    change = np.abs(np.diff(frames.astype(np.int16), axis=0))
    return float(np.where(change > NOISE, change, 0).mean()) / 255.0


def motion_ratio(frames: Frames, truth: Frames) -> float:
    """Return motion relative to ground truth at its frame count: 1 is alike, 0 is frozen; two still clips give 1."""
    return (motion(resample_frames(frames, len(truth))) + STILL) / (motion(truth) + STILL)


def copying(clip: ArrayLike, truth: ArrayLike, last_input: ArrayLike) -> tuple[float, float]:
    """Return (copy, copy_excess) from CLIP features (T', D), (T, D) and (D,).

    copy: mean cosine of the clip's frames with the last input frame, −1..1. copy_excess: the same minus ground truth's
    own, which shares its scene with the input; above 0 the clip clings to the input more than the answer does.
    """
    last = normalised(last_input, "features of the last input frame")
    own = float((normalised(clip, "features of the generated frames") @ last).mean())
    return own, own - float((normalised(truth, "features of the true frames") @ last).mean())


def sharpness(frames: Frames) -> float:
    """Return the mean variance of the Laplacian of luma (0..1): high for detail and noise, 0 for a flat picture."""
    if min(frames.shape[1:3]) < 3:
        raise RewardError(f"sharpness needs frames of at least 3x3 pixels, got {frames.shape[1]}x{frames.shape[2]}")
    luma = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255.0
    centre = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4.0 * centre
    return float(laplacian.var(axis=(1, 2)).mean())


def saturation(frames: Frames) -> float:
    """Return the mean HSV saturation, (max − min) / max over RGB, 0..1; black counts as 0."""
    red, green, blue = np.moveaxis(frames, -1, 0)  # channel by channel: numpy is slow along an axis of three
    high = np.maximum(np.maximum(red, green), blue).astype(np.float32)
    low = np.minimum(np.minimum(red, green), blue).astype(np.float32)
    return float(((high - low) / np.maximum(high, 1.0)).mean())


def frame_diagnostics(frames: Frames, truth: Frames) -> dict[str, float]:
    """Return ``motion_ratio``, ``sharpness_ratio`` and ``saturation_shift`` of a clip relative to ground truth."""
    return {
        "motion_ratio": motion_ratio(frames, truth),
        "sharpness_ratio": (sharpness(frames) + 1e-6) / (sharpness(truth) + 1e-6),
        "saturation_shift": saturation(frames) - saturation(truth),
    }


def component_correlations(values: Mapping[str, ArrayLike]) -> dict[tuple[str, str], float]:
    """Return Pearson's correlation of each pair of reward components, −1..1, names in the given order.

    ``values``: name → (N,). A pair in which one component is constant has no correlation and is left out.
    """
    arrays = {name: np.asarray(v, dtype=np.float64) for name, v in values.items()}
    result: dict[tuple[str, str], float] = {}
    for a, b in combinations(arrays, 2):
        x, y = arrays[a] - arrays[a].mean(), arrays[b] - arrays[b].mean()
        scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
        # Rounding leaves a constant component with a spread near 1e-16 of its size, whose correlation is noise.
        if min(np.abs(x).max(), np.abs(y).max()) > 1e-9 and scale > 0:
            result[a, b] = float(np.clip((x * y).sum() / scale, -1.0, 1.0))
    return result
