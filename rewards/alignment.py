"""Agreement of two videos in a video encoder's feature space, moment by moment, where one of them may be late.

Works on features (T, D) of T moments. Dynamic time warping: Sakoe and Chiba 1978, IEEE Transactions on Acoustics, Speech, and Signal
Processing 26(1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from rewards.similarity import normalised, resample_frames


def aligned_similarity(clip: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean cosine of the moments of ``clip`` (T', D), resampled to those of ``truth`` (T, D), −1..1."""
    target = normalised(truth, "features of the true clip")
    ours = resample_frames(normalised(clip, "features of the generated clip"), len(target))
    return float((ours * target).sum(axis=-1).mean())


def warped_similarity(clip: ArrayLike, truth: ArrayLike) -> float:
    """Return the mean cosine along the warping path of least cost (1 − cosine) between (T', D) and (T, D), −1..1.

    The path goes from the first pair of moments to the last by steps of one in either clip, or both: a clip that does the right
    thing earlier, later or at another speed is not wrong.
    """
    ours, target = normalised(clip, "features of the generated clip"), normalised(truth, "features of the true clip")
    cosine = ours @ target.T
    rows, columns = cosine.shape
    cost = np.full((rows + 1, columns + 1), np.inf)
    total, length = np.zeros_like(cost), np.zeros_like(cost)
    cost[0, 0] = 0.0
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            # Of equal costs the diagonal: the shorter path.
            before = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda place: cost[place])
            cost[i, j] = cost[before] + 1.0 - cosine[i - 1, j - 1]
            total[i, j] = total[before] + cosine[i - 1, j - 1]
            length[i, j] = length[before] + 1.0
    return float(total[-1, -1] / length[-1, -1])
