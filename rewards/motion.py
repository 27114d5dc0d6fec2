"""Agreement of two clips in how much moves where, and in which direction. Frames are uint8 (T, H, W, 3) RGB.

A still clip earns 0 here, however well its picture fits; that is what CLIP's similarity cannot say. Directions are found by block
matching, as video codecs do (Jain and Jain 1981, IEEE Transactions on Communications 29(12)), on frames of about 64 pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rewards.errors import RewardError
from rewards.signs import NOISE
from rewards.similarity import resample_frames

Frames = NDArray[np.uint8]
Floats = NDArray[np.float64]

GRID = 8
"""Cells along each side in which motion is compared."""
SIDE = 64
"""About how many pixels the shorter side has when directions are looked for."""
REACH = 4
"""Largest displacement between two frames, in pixels of that size."""
RELUCTANCE = 0.5
"""Grey levels by which a pixel of displacement must pay: a flat cell has no direction."""


def motion_agreement(clip: Frames, truth: Frames) -> float:
    """Return how far ``clip`` moves as ``truth`` does, 0..1: agreement of energy times agreement of direction.

    ``clip`` is resampled uniformly to the frame count of ``truth``. Energy is a cell's mean change between two frames, over the changes
    above ``NOISE``; its agreement is the sum of the lesser over the sum of the greater of the two clips' energies. Direction
    agrees by the cosine of the cells' displacements, 0 where they oppose each other, weighed by the lesser energy. Two still clips
    agree (1); a still one and a moving one do not (0). Raises RewardError for frames too small for the grid.
    """
    ours, theirs = resample_frames(clip, len(truth)).astype(np.float64), truth.astype(np.float64)
    energy, expected = energies(ours), energies(theirs)
    greater = float(np.maximum(energy, expected).sum())
    if greater == 0.0:
        return 1.0
    lesser = np.minimum(energy, expected)
    if lesser.sum() == 0.0:
        return 0.0
    agreement = cosines(displacements(ours), displacements(theirs)).clip(min=0.0)
    return float(lesser.sum() / greater * (lesser * agreement).sum() / lesser.sum())


def energies(frames: Floats) -> Floats:
    """Return the mean change of each cell between consecutive ``frames`` (T, H, W, 3): (T − 1, GRID, GRID), grey levels."""
    change = np.abs(np.diff(frames, axis=0))
    return _cells(np.where(change > NOISE, change, 0.0))


def displacements(frames: Floats) -> Floats:
    """Return where each cell of ``frames`` (T, H, W, 3) has gone in the next frame: (T − 1, GRID, GRID, 2), down and right.

    The unit is a pixel of frames whose shorter side is about SIDE.
    """
    small = _shrunk(frames)
    now, then = small[:-1], np.pad(small[1:], ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    height, width = small.shape[1:3]
    moves = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    costs = [
        _cells(np.abs(then[:, REACH + y : REACH + y + height, REACH + x : REACH + x + width] - now))
        + RELUCTANCE * np.hypot(y, x)
        for y, x in moves
    ]
    found: Floats = np.asarray(moves, dtype=np.float64)[np.argmin(np.stack(costs), axis=0)]
    return found


def cosines(first: Floats, second: Floats) -> Floats:
    """Return the cosine of the displacements (…, 2), −1..1; 1 where neither moves, 0 where one of them does."""
    lengths = np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-1)
    product = lengths[0] * lengths[1]
    both = (first * second).sum(axis=-1) / np.where(product > 0, product, 1.0)
    return np.where(product > 0, both, ((lengths[0] == 0) & (lengths[1] == 0)).astype(np.float64))


def _shrunk(frames: Floats) -> Floats:
    """Return ``frames`` (T, H, W, 3) averaged over squares, with a shorter side of about SIDE."""
    square = max(1, min(frames.shape[1:3]) // SIDE)
    height, width = frames.shape[1] // square, frames.shape[2] // square
    whole = frames[:, : height * square, : width * square]
    return whole.reshape(len(frames), height, square, width, square, 3).mean(axis=(2, 4))


def _cells(frames: Floats) -> Floats:
    """Return the means (T, GRID, GRID) of the cells of ``frames`` (T, H, W, 3), without pixels that do not fill a cell."""
    height, width = frames.shape[1] // GRID, frames.shape[2] // GRID
    if min(height, width) < 1:
        raise RewardError(
            f"motion needs frames of at least {GRID}x{GRID} pixels, got {frames.shape[1]}x{frames.shape[2]}"
        )
    whole = frames[:, : height * GRID, : width * GRID]
    return np.asarray(whole.reshape(len(frames), GRID, height, GRID, width, 3).mean(axis=(2, 4, 5)))
