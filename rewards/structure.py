"""Structural similarity of two pictures (SSIM; Wang et al. 2004, IEEE Transactions on Image Processing 13(4))."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from rewards.errors import RewardError

Frame = NDArray[np.uint8]

WINDOW, SIGMA = 11, 1.5
"""Side of the Gaussian window in pixels, and its standard deviation."""
K1, K2 = 0.01, 0.03


def ssim(first: Frame, second: Frame) -> float:
    """Return the mean SSIM of two uint8 (H, W, 3) RGB pictures, −1..1, over the channels and all places.

    Pictures are mirrored at their edges. Raises RewardError for pictures of different sizes, or smaller than the window.
    """
    if first.shape != second.shape:
        raise RewardError(f"SSIM compares pictures of one size, not {first.shape} and {second.shape}")
    if min(first.shape[:2]) < WINDOW:
        raise RewardError(
            f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, got {first.shape[0]}x{first.shape[1]}"
        )
    x, y = first.astype(np.float64) / 255.0, second.astype(np.float64) / 255.0
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = (np.maximum(_blurred(z * z) - _blurred(z) ** 2, 0.0) for z in (x, y))
    covariance = _blurred(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + K1**2) * (2 * covariance + K2**2)
    below = (mean_x**2 + mean_y**2 + K1**2) * (var_x + var_y + K2**2)
    return float((above / below).mean())


def first_frame(clip: NDArray[np.uint8], last_input: Frame) -> float:
    """Return the SSIM of the first frame of ``clip`` (T, H, W, 3) with the last input frame (H, W, 3), −1..1.

    1: the clip goes on where the input ends.
    """
    return ssim(clip[0], last_input)


def _blurred(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gaussian means of a picture (H, W, 3)."""
    edge = WINDOW // 2
    return np.asarray(gaussian_filter(picture, (SIGMA, SIGMA, 0.0), radius=(edge, edge, 0), mode="mirror"))
