"""Video bytes to frames and back, with PyAV.

Responsible for: writing small mp4s whose colour survives, and reading any ordinary video (variable frame rate,
rotation, odd sizes, non-square pixels) into a fixed number of equally sized frames.
Not responsible for: files, containers and times (``reading``), how a picture is turned and scaled (``geometry``), where
the bytes come from (``source``, ``importers``), and what a model does with the frames.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from cluster.errors import DataError
from pipeline.data.geometry import PixelBudget, fitted, orientation, shown_size, stretched
from pipeline.data.reading import (
    TIME_TOLERANCE_S,
    Part,
    Source,
    VideoLimits,
    check_span,
    frames_of,
    nothing_decoded,
    opened,
    packet_times,
    part_of,
)

__all__ = [
    "PixelBudget",
    "VideoInfo",
    "VideoLimits",
    "decode_budget",
    "decode_scaled",
    "decode_timed",
    "decode_video",
    "encode_mp4",
    "pace_of",
    "probe",
]

Fit = Callable[[av.VideoFrame, av.VideoStream], np.ndarray]
"""Makes a decoded picture the size that is wanted, uint8 (H, W, 3); of one video always the same."""

RATES = (1e-5, 1000.0)  # frames a second that an mp4 is written with: its times are counted in 32 bits
_HALF = 0.5  # of a clip's time; where more of it cannot be decoded, the rest is not the clip


@dataclass(frozen=True)
class VideoInfo:
    """What a video says about itself; ``width`` and ``height`` are as shown (orientation and pixel aspect applied)."""

    width: int
    height: int
    frames: int
    seconds: float
    fps: float
    codec: str
    container: str
    rotation: int  # degrees counterclockwise that a player turns the coded picture
    mirrored: bool = False  # whether it is mirrored, left to right, after that
    pace: float = 0.0  # frames per second where one follows another, pauses left out; ``fps`` where there are none


# --- writing --------------------------------------------------------------------------------------------------------


def encode_mp4(frames: np.ndarray, fps: float, near_lossless: bool = True) -> bytes:
    """Return ``frames`` as mp4/h264 bytes; the same frames give the same bytes.

    ``frames``: uint8 (T, H, W, 3) RGB, T ≥ 1. ``near_lossless`` keeps full colour resolution (yuv444p, for datasets of
    small clips); otherwise yuv420p at ordinary quality, which every browser plays, where odd sizes gain one repeated
    row or column. Near lossless means that the codec loses nothing and RGB → YUV → RGB rounds by 2 or 3 levels at most.
    Raises DataError for another shape, dtype or rate.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape) < 1:
        raise DataError(f"frames must be uint8 (T, H, W, 3) with T ≥ 1, not {frames.dtype} {frames.shape}")
    if not RATES[0] <= fps <= RATES[1]:
        raise DataError(f"fps={fps} must lie in [{RATES[0]:g}, {RATES[1]:g}]")
    # The closest fraction of small numbers, of the rate or of its inverse: a picture in 2500 s is 1/2500 of one a second.
    rate = Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / Fraction(1 / fps).limit_denominator(1001)
    if not near_lossless and (frames.shape[1] % 2 or frames.shape[2] % 2):
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    # Bit-exact flags leave the library's version out of the file, so that datasets can be compared by hash.
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        quality = {"crf": "0", "preset": "medium"} if near_lossless else {"crf": "18", "preset": "veryfast"}
        # Without cpu-independent, x264's lookahead gives other bytes for other addresses of the same pictures.
        options = {**quality, "x264-params": "threads=1:cpu-independent=1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if near_lossless else "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.colorspace = 6  # SMPTE 170M (BT.601), what swscale converts to below
        stream.codec_context.color_range = 1  # limited
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU601", dst_color_range="MPEG")
            frame.pts = index
            frame.time_base = 1 / Fraction(stream.codec_context.rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


# --- reading --------------------------------------------------------------------------------------------------------


def decode_video(
    source: Source,
    num_frames: int,
    height: int,
    width: int,
    limits: VideoLimits | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """Return uint8 (num_frames, height, width, 3) RGB, uniform in *time* over the video or over [start, end) seconds.

    The first and the last frame are always among them; in between, the picture on screen at that time is taken, so a
    video of variable frame rate plays at its true speed, and a shorter video repeats frames. Rotation and pixel aspect
    are honoured, then the picture is scaled to cover (height, width) and cropped around its centre.
    Raises DataError for no frames, a broken or truncated file, and anything above ``limits``.
    """
    return decode_timed(source, num_frames, height, width, limits, start=start, end=end)[0]


def decode_timed(
    source: Source,
    num_frames: int,
    height: int,
    width: int,
    limits: VideoLimits | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
) -> tuple[np.ndarray, float]:
    """Return the frames of :func:`decode_video` and the seconds between the first and the last of them."""
    limits = limits or VideoLimits()

    def fit(frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
        return fitted(frame, height, width, stream, limits.max_pixels)

    return _decoded(source, lambda times: num_frames, fit, limits, part_of(source, limits, start, end))


def decode_scaled(
    source: Source,
    size: Callable[[int, int], tuple[int, int]],
    count: Callable[[np.ndarray], int],
    limits: VideoLimits | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
) -> tuple[np.ndarray, float]:
    """Return the frames of :func:`decode_timed`, whose number and size depend on the video, and their seconds.

    ``size``: the (height, width) as shown → those that are wanted. ``count``: the times of all frames (s, ascending) → how many
    are wanted, at least 1. It reads a video as often as :func:`decode_timed` does, where a :func:`probe` before would double that.
    """
    limits = limits or VideoLimits()
    wanted: list[tuple[int, int]] = []

    def fit(frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
        wanted[:] = wanted or [size(*shown_size(frame, stream))]  # the first picture's, for all of them
        return fitted(frame, *wanted[0], stream, limits.max_pixels)

    return _decoded(source, count, fit, limits, part_of(source, limits, start, end))


def decode_budget(
    source: Source, num_frames: int, budget: PixelBudget, limits: VideoLimits | None = None
) -> tuple[np.ndarray, float]:
    """Return the frames of :func:`decode_video` at the size that ``budget`` gives the video, nothing cropped, and their seconds."""
    limits = limits or VideoLimits()
    size: list[tuple[int, int]] = []

    def fit(frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
        size[:] = size or [budget.size(*shown_size(frame, stream))]  # the first picture's, for all of them
        return stretched(frame, *size[0])

    return _decoded(source, lambda times: num_frames, fit, limits, part_of(source, limits, None, None))


def _decoded(
    source: Source, count: Callable[[np.ndarray], int], fit: Fit, limits: VideoLimits, part: Part
) -> tuple[np.ndarray, float]:
    with opened(source, limits) as (container, stream):
        promised = packet_times(container, stream, part, limits)
    times = promised
    # Packets only promise: those before the first key frame give no picture, and some containers number them alone. So the
    # frames are taken again, by the times of the decoded pictures, where the first or the last of these is another one.
    for _ in range(3):
        if times is None:
            wanted = np.empty(0)
        else:
            number = count(times)
            wanted = np.linspace(times[0], times[-1], number) if number > 1 else times[-1:]
        out, found = _filled(source, limits, part, wanted, fit)
        if times is not None and np.allclose(found[[0, -1]], times[[0, -1]], rtol=0, atol=TIME_TOLERANCE_S):
            return out, float(found[-1] - found[0])
        _check_head(promised, found, part)
        times = found
    raise DataError("broken video: it gives other frames each time that it is read")


def _filled(
    source: Source, limits: VideoLimits, part: Part, wanted: np.ndarray, fit: Fit | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames on screen at the ``wanted`` times (s, ascending), and the times of all that were decoded.

    ``fit`` is needed where there are any.
    """
    out = np.empty((0, 0, 0, 3), np.uint8)
    filled = 0

    def show(held: av.VideoFrame, stream: av.VideoStream, begin: int, end: int) -> None:
        nonlocal out
        assert fit is not None
        picture = fit(held, stream)
        if not len(out):
            out = np.empty((len(wanted), *picture.shape), np.uint8)
        out[begin:end] = picture

    times: list[float] = []
    with opened(source, limits) as (container, stream), closing(frames_of(container, stream, part, limits)) as pictures:
        held: av.VideoFrame | None = None
        for frame, shown in pictures:
            # ``held`` is on screen until ``frame`` begins.
            begin = filled
            while held is not None and filled < len(wanted) and wanted[filled] + TIME_TOLERANCE_S < shown:
                filled += 1
            if held is not None and filled > begin:
                show(held, stream, begin, filled)
            held = frame
            times.append(shown)
            check_span(times, limits)
        if held is None:
            raise DataError(nothing_decoded(part))
        if filled < len(wanted):
            show(held, stream, filled, len(wanted))
    return out, np.asarray(times)


def _check_head(promised: np.ndarray | None, found: np.ndarray, part: Part) -> None:
    """Raise DataError where more than half of a whole clip's time cannot be decoded."""
    if promised is None or not part.whole:
        return
    held, said = found[-1] - found[0], promised[-1] - promised[0]
    if held < _HALF * said:
        raise DataError(
            f"broken video: only {held:.2f} of its {said:.2f} s can be decoded; does it begin with a key frame?"
        )


def probe(
    source: Source,
    limits: VideoLimits | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
) -> VideoInfo:
    """Return what ``source``, or [start, end) seconds of it, holds, decoding as little as it can; raises DataError.

    ``frames``, ``seconds`` and ``fps`` are of that part, from the times of its frames.
    """
    limits = limits or VideoLimits()
    part = part_of(source, limits, start, end)
    with opened(source, limits) as (container, stream):
        times = promised = packet_times(container, stream, part, limits)
        codec, form = stream.codec_context.name, container.format.name
    with opened(source, limits) as (container, stream), closing(frames_of(container, stream, part, limits)) as pictures:
        frame, first = next(pictures, (None, 0.0))
        if frame is None:
            raise DataError(nothing_decoded(part))
        height, width = shown_size(frame, stream)
        laid = orientation(frame)
    if times is None or abs(times[0] - first) > TIME_TOLERANCE_S:
        times = _filled(source, limits, part, np.empty(0))[1]
        _check_head(promised, times, part)
    span = float(times[-1] - times[0])
    # N frames show N intervals; the last one's length is taken to be the mean of the others.
    seconds = span * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
    fps = len(times) / seconds if seconds > 0 else 0.0
    return VideoInfo(width, height, len(times), seconds, fps, codec, form, laid.rotation, laid.mirrored, pace_of(times))


def pace_of(times: np.ndarray) -> float:
    """Return frames per second over the intervals that are no pauses: at most one and a half times the median."""
    intervals = np.diff(times)
    intervals = intervals[intervals > 0]
    if not len(intervals):
        return 0.0
    return 1 / float(intervals[intervals <= 1.5 * np.median(intervals)].mean())
