"""Real clips, and copies of them with what a gate is there to refuse drawn in."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np

from pipeline.data.real import packaged_clips
from pipeline.data.video import decode_video, encode_mp4, probe

REAL: dict[str, Path] = {path.name: path for path in packaged_clips()}
FPS = 25.0
SCENES = {"bikes.mp4": (3.04, 5.0), "bigbuckbunny.mp4": (2.2, 4.1), "carphone_pristine.mp4": (0.0, 2.0)}


@cache
def scene(name: str, height: int = 360) -> np.ndarray:
    """Two seconds without a cut of a real clip, uint8 (T, H, W, 3), as they would lie in a video of strangers."""
    start, end = SCENES[name]
    info = probe(REAL[name])
    width = 2 * round(info.width * height / info.height / 2)
    return decode_video(REAL[name], round((end - start) * FPS), height, width, start=start, end=end)


def looked_at(frames: np.ndarray) -> np.ndarray:
    """What a gate sees of ``frames`` after they were coded as usual."""
    scale = min(1.0, 320 / max(frames.shape[1:3]))
    height, width = (2 * round(side * scale / 2) for side in frames.shape[1:3])
    small = np.stack([cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) for picture in frames])
    return decode_video(encode_mp4(small, FPS, near_lossless=False), len(small), height, width)


def subtitle(frames: np.ndarray) -> np.ndarray:
    return written(frames, ["Now add two spoons of flour"], 0.8, frames.shape[1] - 30)


def slide(frames: np.ndarray) -> np.ndarray:
    return written(frames, ["Step 1: take the flour", "Step 2: add the water", "Step 3: stir it well"], 1.0, 60)


def logo(frames: np.ndarray) -> np.ndarray:
    return written(frames, ["VANS TV"], 0.6, 30)


def written(frames: np.ndarray, lines: list[str], size: float, top: int) -> np.ndarray:
    out = frames.copy()
    for picture in out:
        for number, line in enumerate(lines):
            place = (20, top + number * int(40 * size))
            cv2.putText(picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), int(5 * size), cv2.LINE_AA)
            cv2.putText(
                picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), int(2 * size), cv2.LINE_AA
            )
    return out


def letterbox(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    out[:, :45] = out[:, -45:] = 0
    return out


def white_pillars(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    out[:, :, :60] = out[:, :, -60:] = 235
    return out


def blurred_pillars(frames: np.ndarray) -> np.ndarray:
    """A tall video between blurred margins."""
    out = np.stack([cv2.GaussianBlur(picture, (61, 61), 0) // 2 for picture in frames])
    height, width = frames.shape[1:3]
    tall = np.stack([cv2.resize(picture, (width // 3 // 2 * 2, height)) for picture in frames])
    left = (width - tall.shape[2]) // 2
    out[:, :, left : left + tall.shape[2]] = tall
    return out


def picture_in_picture(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    height, width = (side // 3 for side in frames.shape[1:3])
    small = np.stack([cv2.resize(picture[:, ::-1], (width, height)) for picture in frames[::-1]])
    out[:, -height - 15 : -15, -width - 15 : -15] = small
    return out


def flashing(frames: np.ndarray) -> np.ndarray:
    out = frames.copy()
    out[[10, 30]] = 255
    return out


def frozen(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames[:1], len(frames), axis=0)


def darkened(frames: np.ndarray) -> np.ndarray:
    return frames // 12


REFUSED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], set[str]]] = {
    "subtitle": (subtitle, {"text"}),
    "slide": (slide, {"text"}),
    "letterbox": (letterbox, {"border"}),
    "white pillars": (white_pillars, {"border"}),
    "blurred pillars": (blurred_pillars, {"inset"}),
    "picture in picture": (picture_in_picture, {"inset"}),
    "flashing": (flashing, {"flashes"}),
    "frozen": (frozen, {"still", "inset"}),
    "darkened": (darkened, {"dark"}),
}


RATE = 12
SPANS = {"bikes.mp4": (1.5, 3.9), "bigbuckbunny.mp4": (0.37, 2.1), "carphone_pristine.mp4": (1.1, 2.9)}


def coded_anew(name: str, codec: str, size: tuple[int, int], options: dict[str, str]) -> bytes:
    """A part of a real clip with other times, another codec, size and rate."""
    start, end = SPANS[name]
    info = probe(REAL[name])
    frames = decode_video(
        REAL[name], round((end - start) * RATE), info.height // 2 * 2, info.width // 2 * 2, start=start, end=end
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(width=size[0], height=size[1], format="yuv420p")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


CODECS = [
    ("mpeg4", (160, 120), {"b": "120k"}),
    ("libx264", (320, 136), {"crf": "38"}),
    ("mpeg2video", (96, 64), {}),
]
