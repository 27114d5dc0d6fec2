"""Moving picture of what the toy world asks, for the documentation: input clip, question, and the true answer as a clip.

Run: ``python -m pipeline.data.toy.picture docs/images/toy_world.mp4``. The same code gives the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.video import encode_mp4

from .scene import FPS, FRAMES, SIZE
from .world import ToySample, make_sample

SHOWN = (("test", 0), ("test", 3))
"""Split and index of the samples: one of each kind."""
_ZOOM = 6
_CLIP = SIZE * _ZOOM
_GAP, _TEXT = 16, 56
_WIDTH = 2 * _CLIP + 3 * _GAP
_HEIGHT = _CLIP + _TEXT + 2 * _GAP
_HOLD = FRAMES
"""Frames for which the end stands still, before a player begins anew."""
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (225, 225, 225)


def toy_picture() -> np.ndarray:
    """Return uint8 (T, H, W, 3): for each of ``SHOWN`` a card on which the input plays, then the answer, then both stand still."""
    cards = [_card(make_sample(index, split)) for split, index in SHOWN]
    return np.concatenate(cards, axis=2)


def _card(sample: ToySample) -> np.ndarray:
    both = [
        np.kron(clip, np.ones((1, _ZOOM, _ZOOM, 1), np.uint8)) for clip in (sample.input_frames, sample.target_frames)
    ]
    frames = []
    for time in range(2 * FRAMES + _HOLD):
        page = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
        draw = ImageDraw.Draw(page)
        for side, clip in enumerate(both):
            left, moment = _GAP + side * (_CLIP + _GAP), time - side * FRAMES
            if moment < 0:
                draw.rectangle((left, _GAP, left + _CLIP - 1, _GAP + _CLIP - 1), fill=_FAINT)
            else:
                page.paste(Image.fromarray(clip[min(moment, FRAMES - 1)]), (left, _GAP))
        below = _GAP + _CLIP + 8
        draw.text((_GAP, below), sample.question, fill=_INK, font=ImageFont.load_default(18))
        if time >= FRAMES:
            draw.text((_GAP, below + 28), sample.caption, fill=_INK, font=ImageFont.load_default(18))
        frames.append(np.asarray(page))
    return np.stack(frames)


def write_toy_picture(path: Path) -> None:
    """Write it to ``path`` as an mp4 that every browser plays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4(toy_picture(), FPS, near_lossless=False))


if __name__ == "__main__":
    write_toy_picture(Path(sys.argv[1]))
