"""What can be measured of a clip without a model: pure functions of its frames, uint8 RGB (T, H, W, 3), each one number.

Responsible for the numbers; ``gates`` compares them with thresholds. They are made for frames of some 180 lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import cv2
import numpy as np

from pipeline.data.build.hashes import NEAR, distances, luma

BLACK = 28  # brightness, of 255, that a black bar does not exceed after coding
EVEN = 3.0  # standard deviation within a bar of any other colour
LEAP = 24.0  # change of mean brightness from frame to frame that is a flash, when it goes back
BACK_S = 0.25  # within which a flash goes back
CHANGED = 12  # grey levels by which a pixel has changed
EDGE = 48  # grey levels across an edge of overlaid text
LEAST = 24  # pixels of a side below which neither inset nor text is looked for
SEAM = 6  # grey levels across the edge of an inset, on average over time
LASTING = 0.7  # share of the frames in which an edge is in its place, where it belongs to an overlay


def take(frames: np.ndarray, fps: float) -> dict[str, float]:
    """Return every measure of a clip by its name; ``fps``: of these frames."""
    return {
        "brightness": brightness(frames),
        "border": border(frames),
        "inset": inset(frames),
        "motion": motion(frames, fps),
        "flashes": flashes(frames, fps),
        "text": text(frames),
    }


def brightness(frames: np.ndarray) -> float:
    """Return the mean brightness, 0 to 1."""
    return float(luma(frames).mean() / 255)


def border(frames: np.ndarray) -> float:
    """Return the share of the picture's area that bars take, 0 to 1: black ones at any edge, and even ones at two opposite edges.

    A bar is a bar in every frame. A picture that is black all over is all border.
    """
    grey = _spread(luma(frames), 24)
    whole = grey.shape[1] * grey.shape[2]
    top, bottom = _bars(grey)
    inner = grey[:, top : grey.shape[1] - bottom]
    if not inner.size:
        return 1.0
    left, right = _bars(inner.transpose(0, 2, 1))
    return 1.0 - inner.shape[1] * max(0, inner.shape[2] - left - right) / whole


def _bars(grey: np.ndarray) -> tuple[int, int]:
    """Return how many rows at the top and at the bottom of (T, H, W) are bars."""
    low, high = np.percentile(grey, (2, 98), axis=(0, 2))
    black = high <= BLACK
    if black.all():
        return len(black), 0
    top, bottom = int(np.argmin(black)), int(np.argmin(black[::-1]))
    if top or bottom:
        return top, bottom
    # Bars of another colour: alike at both edges, and of one size, or a clear sky would be one.
    rows = grey.reshape(len(grey), grey.shape[1], -1).transpose(1, 0, 2).reshape(grey.shape[1], -1)
    mean, even = rows.mean(axis=1), rows.std(axis=1) <= EVEN
    if even.all() or not (even[0] and even[-1]) or abs(mean[0] - mean[-1]) > EVEN:
        return 0, 0
    top = int(np.argmin(even & (np.abs(mean - mean[0]) <= EVEN)))
    bottom = int(np.argmin((even & (np.abs(mean - mean[-1]) <= EVEN))[::-1]))
    return (top, bottom) if abs(top - bottom) <= max(2, 0.02 * len(even)) and high[top] - low[top] > EVEN else (0, 0)


def inset(frames: np.ndarray) -> float:
    """Return how completely a straight frame encloses a picture in the picture, 0 to 1: 1 where all of its sides are lasting edges.

    A side may be the edge of the picture, at most two may: so a split screen has none, and a picture between blurred or
    coloured margins has. Insets of less than 1/20 of the picture are not looked for.
    """
    grey = _spread(luma(frames), 12).astype(np.int16)
    height, width = grey.shape[1:]
    if min(height, width) < LEAST:
        return 0.0
    across_columns, across_rows = (np.abs(np.diff(grey, axis=axis)).mean(axis=0, dtype=np.float32) for axis in (2, 1))
    columns, rows = _lines(_ridges(across_columns.T)), _lines(_ridges(across_rows))
    best = 0.0
    for (x, across), (x2, across2) in combinations(columns, 2):
        for (y, along), (y2, along2) in combinations(rows, 2):
            sides = (across is None) + (across2 is None) + (along is None) + (along2 is None)
            if sides > 2 or (x2 - x) * (y2 - y) < height * width / 20:
                continue
            # Two lines from edge to edge of the picture: a roof or a table has them, margins are of one size.
            if across is across2 is None and abs(y - (height - y2)) > 0.02 * height:
                continue
            if along is along2 is None and abs(x - (width - x2)) > 0.02 * width:
                continue
            parts = [
                line[a:b].mean()
                for line, a, b in ((across, y, y2), (across2, y, y2), (along, x, x2), (along2, x, x2))
                if line is not None
            ]
            best = max(best, float(min(parts)))
    return best


def _ridges(step: np.ndarray) -> np.ndarray:
    """Return where the mean ``step`` (N, L) between rows stands out from the rows around: an edge that keeps its place."""
    near = cv2.blur(step, (1, 11), borderType=cv2.BORDER_REFLECT)
    return (step >= SEAM) & (step >= 2 * near)


def _lines(edges: np.ndarray) -> list[tuple[int, np.ndarray | None]]:
    """Return the picture's two edges and the few longest straight lines of (N, L), with where they are edges, by their place."""
    length = edges.sum(axis=1)
    strongest = [int(place) for place in np.argsort(-length, kind="stable")[:8] if length[place] >= edges.shape[1] / 5]
    # An edge that was scaled lies between two or three pixels.
    near: list[np.ndarray] = [np.any(edges[max(0, place - 1) : place + 2], axis=0) for place in strongest]
    found: list[tuple[int, np.ndarray | None]] = [(place + 1, line) for place, line in zip(strongest, near)]
    return sorted([(0, None), *found, (len(edges) + 1, None)], key=lambda item: item[0])


def motion(frames: np.ndarray, fps: float) -> float:
    """Return the share of pixels that change within half a second, 0 to 1, on average; ``fps``: of these frames."""
    small = np.stack([cv2.resize(grey, (64, 36), interpolation=cv2.INTER_AREA) for grey in luma(frames)]).astype(
        np.int16
    )
    step = max(1, min(round(fps / 2), len(small) - 1))
    return float((np.abs(small[step:] - small[:-step]) >= CHANGED).mean()) if len(small) > 1 else 0.0


def flashes(frames: np.ndarray, fps: float) -> float:
    """Return flashes per second: the mean brightness leaps, and leaps back within a quarter of a second."""
    mean = luma(frames).mean(axis=(1, 2))
    leaps = np.diff(mean)
    within = max(1, round(BACK_S * fps))
    count, place = 0, 0
    while place < len(leaps):
        if abs(leaps[place]) >= LEAP:
            after = leaps[place + 1 : place + 1 + within]
            back = np.flatnonzero(-np.sign(leaps[place]) * after >= LEAP)
            if len(back):
                count += 1
                place += int(back[0]) + 1
        place += 1
    return count * fps / len(frames)


def text(frames: np.ndarray) -> float:
    """Return the share of the picture that looks like overlaid text, 0 to 1.

    Letters are many sharp strokes side by side: in a window of a letter's height and a few letters' width, edges are dense, go from
    dark to bright as often as from bright to dark, and stay in their place while the picture moves.
    """
    grey = _spread(luma(frames), 8).astype(np.int16)
    height = grey.shape[1]
    if min(grey.shape[1:]) < LEAST:
        return 0.0
    step = np.diff(grey, axis=2)
    rising, falling = ((side >= EDGE).mean(axis=0) >= LASTING for side in (step, -step))
    window = (max(3, 2 * round(height / 40) + 1), max(9, 2 * round(height / 12) + 1))
    up, down = (cv2.blur(side.astype(np.float32), window[::-1]) for side in (rising, falling))
    dense = (up + down >= 0.2) & (np.minimum(up, down) >= 0.35 * np.maximum(up, down))
    return float(dense.mean())


def likeness(hashes: Sequence[int] | np.ndarray, before: Sequence[int] | np.ndarray) -> float:
    """Return the share of ``hashes`` (of a clip's frames) that show what one of ``before`` (its neighbour's) shows, 0 to 1."""
    if not len(hashes) or not len(before):
        return 0.0
    return float((distances(hashes, before).min(axis=1) <= NEAR).mean())


def _spread(frames: np.ndarray, count: int) -> np.ndarray:
    """Return at most ``count`` frames, evenly spaced."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))]
