"""Files that a run logs: clips as mp4, film strips and pictures as PNG, text. Written beside and renamed, never half."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.video import encode_mp4


def write_text(text: str, path: Path) -> None:
    """Write ``text`` as UTF-8."""
    _write(text.encode(), path)


def write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    """Write frames, uint8 (T, H, W, 3), as an mp4 that a browser plays; raises DataError for other shapes."""
    _write(encode_mp4(frames, fps, near_lossless=False), path)


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Write a picture, uint8 (H, W, 3)."""
    from PIL import Image

    Image.fromarray(pixels).save(path)


def write_strip(frames: np.ndarray, caption: str, path: Path) -> None:
    """Write the frames of one clip side by side, the caption above them."""
    contact_sheet([(caption or "(no caption)", [Strip("clip", frames)])], path)


def _write(content: bytes, path: Path) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)
