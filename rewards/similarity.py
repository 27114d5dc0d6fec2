"""Agreement of videos and captions in CLIP's feature space: CLIP-V, CLIP-T and CLIPScore.

Works on features, (T, D) for T frames and (D,) for a text, as ``actors.scoring.clip`` makes them; they need not be
normalised. Source: VANS (arXiv 2511.16669) r_v1, r_v2, r_c2; CLIPScore (arXiv 2104.08718) without its factor 2.5.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.errors import RewardError

Floats = NDArray[np.float64]
_Dtype = TypeVar("_Dtype", bound=np.generic)


def resample_frames(frames: NDArray[_Dtype], count: int) -> NDArray[_Dtype]:
    """Return ``count`` of the (T, …) ``frames``, uniformly spaced with both ends; they repeat when count > T.

    Raises RewardError for no frames or a count below 1.
    """
    if count < 1 or len(frames) < 1:
        raise RewardError(f"cannot take {count} frames from {len(frames)}")
    if count == len(frames):
        return frames
    if count == 1:
        return frames[len(frames) // 2 : len(frames) // 2 + 1]
    # Half-way positions round up, always: np.rint would round to even and jitter the spacing.
    return frames[np.floor(np.linspace(0, len(frames) - 1, count) + 0.5).astype(int)]


def normalised(features: ArrayLike, what: str = "features") -> Floats:
    """Return ``features`` (…, D) in float64 at unit length; raises RewardError for non-finite or zero vectors."""
    array = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(array, axis=-1, keepdims=True)
    if array.size == 0 or not np.isfinite(array).all() or (norm == 0).any():
        raise RewardError(
            f"{what} of shape {array.shape} hold a non-finite or an all-zero vector, so they have no direction"
        )
    return array / norm


def clip_v(generated: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean cosine of frame-aligned image features, −1..1.

    ``generated`` (T', D) is resampled uniformly to the T frames of ``truth`` (T, D).
    """
    target = normalised(truth, "features of the true frames")
    clip = resample_frames(normalised(generated, "features of the generated frames"), len(target))
    return float((clip * target).sum(axis=-1).mean())


def clip_t(frames: ArrayLike, text: ArrayLike) -> float:
    """Return the mean over frames (T, D) of the cosine with the text feature (D,), −1..1, unscaled."""
    return float((normalised(frames, "frame features") @ normalised(text, "text features")).mean())


def clip_score(frames: ArrayLike, text: ArrayLike) -> float:
    """Return max(0, CLIP-T), 0..1: the reward of stage 2 for saying what the caption says."""
    return max(0.0, clip_t(frames, text))
