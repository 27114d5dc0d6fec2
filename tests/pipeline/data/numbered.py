"""Videos whose frames say their number, so that a test can tell which picture it got."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH = 32, 64
GOP = {"crf": "1", "g": "25", "bf": "2", "x264-params": "scenecut=0:b-adapt=0"}  # a key frame each 25 frames, B-frames
MPEG = {"qmin": "1", "qmax": "3", "g": "12", "bf": "2"}  # the same for MPEG-1, 2 and 4
NO_B_FRAMES = {"qmin": "1", "qmax": "3"}


def numbered(count: int) -> np.ndarray:
    """Return uint8 (count, 32, 64, 3): frame k shows the bits of k as eight dark or light squares."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1
    squares = np.where(bits, 230, 20).reshape(count, 2, 4).astype(np.uint8)
    return np.repeat(np.kron(squares, np.ones((1, 16, 16), np.uint8))[..., None], 3, axis=-1)


def numbers(frames: np.ndarray) -> list[int]:
    """Return the numbers of frames (T, 32, 64, 3); -1 for one whose squares are neither dark nor light."""
    squares = frames.mean(-1).reshape(-1, 2, 16, 4, 16)[:, :, 4:12, :, 4:12].mean((2, 4)).reshape(-1, 8)
    clear = ((squares < 70) | (squares > 180)).all(1)
    return np.where(clear, ((squares > 180) << np.arange(8)).sum(1), -1).tolist()


def encoded(
    count: int = 60,
    container: str = "mp4",
    codec: str = "libx264",
    *,
    rate: Fraction | int = 25,
    times: Sequence[float] | None = None,
    first: int = 0,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> bytes:
    """Return numbered frames as a file, at ``rate``, or shown at ``times`` (s, of which milliseconds are kept).

    ``first``: the first frame's place at ``rate``. ``options`` are the codec's, ``muxer`` the container's.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = HEIGHT, WIDTH
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.options = options or {}
        unit = 1 / Fraction(rate) if times is None else Fraction(1, 1000)
        if times is not None:
            stream.codec_context.time_base = unit
        for index, image in enumerate(numbered(count)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index + first if times is None else round(times[index] * 1000)
            frame.time_base = unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()
