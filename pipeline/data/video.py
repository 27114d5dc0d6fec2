"""Video bytes to frames and back, with PyAV.

Responsible for: writing small mp4s whose colour survives, and reading any ordinary video (variable frame rate,
rotation, odd sizes, non-square pixels) into a fixed number of equally sized frames, within limits that protect a run
from broken or hostile files.
Not responsible for: where the bytes come from (``source``, ``importers``) and what a model does with the frames.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

from cluster.errors import DataError
from pipeline.data.boxes import check_mp4_index

# Containers that hold a video themselves. Playlists (hls, concat, dash, …) are left out: they open other files.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,ivf,gif,mxf,wav"
TIME_TOLERANCE_S = 1e-3  # containers that count in milliseconds round their timestamps by half of this


@dataclass(frozen=True)
class VideoLimits:
    """What is accepted from one source video."""

    max_pixels: int = 3840 * 2160  # per frame
    max_frames: int = 20_000  # in the part that is read
    max_seconds: float = 3600.0  # of the part that is read
    max_bytes: int = 512 << 20  # of the file
    max_decode_s: float = 300.0  # of this machine's time, for one pass over the file


@dataclass(frozen=True)
class VideoInfo:
    """What a video says about itself; ``width`` and ``height`` are as shown (rotation and pixel aspect applied)."""

    width: int
    height: int
    frames: int
    seconds: float
    fps: float
    codec: str
    container: str
    rotation: int  # degrees counterclockwise that a player turns the coded picture


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
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise DataError(f"fps={fps} must lie in (0, 1000]")
    if not near_lossless:
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    # Bit-exact flags leave the library's version out of the file, so that datasets can be compared by hash.
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        quality = {"crf": "0", "preset": "medium"} if near_lossless else {"crf": "18", "preset": "veryfast"}
        options = {**quality, "x264-params": "threads=1"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
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
    source: bytes | str | Path,
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
    source: bytes | str | Path,
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
    with _opened(source, limits) as (container, stream):
        window = _Window.of(stream, start, end)
        times = _frame_times(container, stream, window, limits)
    wanted = np.linspace(times[0], times[-1], num_frames) if num_frames > 1 else times[-1:]
    out = np.empty((num_frames, height, width, 3), np.uint8)
    filled = 0
    with _opened(source, limits) as (container, stream):
        held: av.VideoFrame | None = None
        for frame in _decoded(container, stream, window, limits):
            # ``held`` is on screen until ``frame`` begins.
            begin = filled
            while held is not None and filled < num_frames and wanted[filled] + TIME_TOLERANCE_S < frame.time:
                filled += 1
            if held is not None and filled > begin:
                out[begin:filled] = _fitted(held, height, width, stream)
            held = frame
        if held is None:
            raise DataError("no frame could be decoded")
        if filled < num_frames:
            out[filled:] = _fitted(held, height, width, stream)
    return out, float(times[-1] - times[0])


def probe(
    source: bytes | str | Path,
    limits: VideoLimits | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
) -> VideoInfo:
    """Return what ``source``, or [start, end) seconds of it, holds, decoding one frame; raises DataError.

    ``frames``, ``seconds`` and ``fps`` are of that part.
    """
    limits = limits or VideoLimits()
    with _opened(source, limits) as (container, stream):
        window = _Window.of(stream, start, end)
        times = _frame_times(container, stream, window, limits)
        codec, form = stream.codec_context.name, container.format.name
    with _opened(source, limits) as (container, stream):
        frame = next(_decoded(container, stream, window, limits), None)
        if frame is None:
            raise DataError("no frame could be decoded")
        shown_height, shown_width = _shown_size(frame, stream)
        rotation = round(frame.rotation / 90) % 4 * 90
    span = float(times[-1] - times[0])
    # N frames show N intervals; the last one's length is taken to be the mean of the others.
    seconds = span * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
    fps = len(times) / seconds if seconds > 0 else 0.0
    return VideoInfo(shown_width, shown_height, len(times), seconds, fps, codec, form, rotation)


@dataclass(frozen=True)
class _Window:
    """The part of a stream that is read, in the stream's own seconds."""

    start: float
    end: float
    whole: bool

    @classmethod
    def of(cls, stream: av.VideoStream, start: float | None, end: float | None) -> _Window:
        for name, value in (("start", start), ("end", end)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise DataError(f"{name}={value} must be a time in seconds, 0 or later")
        if start is not None and end is not None and end <= start:
            raise DataError(f"end={end} must be later than start={start}")
        if start is None and end is None:
            return cls(-math.inf, math.inf, True)
        origin = float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0
        return cls(origin + (start or 0.0), math.inf if end is None else origin + end, False)

    def holds(self, second: float) -> bool:
        return self.start - TIME_TOLERANCE_S <= second < self.end - TIME_TOLERANCE_S


@contextmanager
def _opened(
    source: bytes | str | Path, limits: VideoLimits
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open ``source`` within ``limits``; whatever PyAV raises while it is open becomes a DataError."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"no such video file: {path}")
        size = path.stat().st_size
    if size > limits.max_bytes:
        raise DataError(f"the file has {size} bytes; at most {limits.max_bytes} are accepted")
    if size == 0:
        raise DataError("the file is empty")
    # ffmpeg looks at frames while it opens a file: it must know the limit, or memory is gone before we can ask.
    # It rounds the width up to its own alignment, so the limit that is exact is checked by us.
    guard = {"max_pixels": str(2 * limits.max_pixels)}
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", **guard}
    try:
        opened = io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")  # noqa: SIM115
        with opened:
            check_mp4_index(opened, size)
            with av.open(opened, options=options) as container:
                yield container, _stream_of(container, limits, guard)
    except (av.FFmpegError, OSError, EOFError, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"broken video: {getattr(error, 'strerror', None) or error}") from error


def _stream_of(
    container: av.container.InputContainer, limits: VideoLimits, guard: dict[str, str]
) -> av.VideoStream:
    """Return the first video stream, ready to be decoded; raises DataError."""
    if not container.streams.video:
        raise DataError("the file has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise DataError("the video's codec is not known")
    if not context.width * context.height:
        raise DataError(f"the frames have no size, or more than the {limits.max_pixels} pixels that are accepted")
    _check_pixels(context.width, context.height, limits)
    if not stream.time_base:
        raise DataError("the video's frames carry no times")
    context.thread_count = 1  # many decoders share the machine's cores
    context.options = guard
    return stream


class _Clock:
    """Ends a pass over a file that takes too long, which neither bytes nor frames bound: packets outside the part that
    is read, and frames that are slow to decode. It counts this thread's CPU time, so that a busy machine refuses nothing.
    """

    def __init__(self, limits: VideoLimits) -> None:
        self._limit, self._end = limits.max_decode_s, time.thread_time() + limits.max_decode_s

    def check(self) -> None:
        """Raise DataError where the time is over."""
        if time.thread_time() > self._end:
            raise DataError(f"reading it took more than {self._limit:g} s; cut the video or raise the limit")


def _check_pixels(width: int, height: int, limits: VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise DataError(
            f"frames of {width}x{height} are {width * height} pixels; at most {limits.max_pixels} are accepted"
        )


def _frame_times(
    container: av.container.InputContainer, stream: av.VideoStream, window: _Window, limits: VideoLimits
) -> np.ndarray:
    """Return the sorted times (s) of the frames in ``window`` from the packets; decodes only where those have none."""
    times: list[float] = []
    packets = 0
    clock = _Clock(limits)
    _seek(container, stream, window)
    for packet in container.demux(stream):
        clock.check()
        if packet.size == 0:  # the flush packet at the end
            continue
        packets += 1
        if packet.pts is None:
            return _decoded_times(container, stream, window, limits)
        begin = float(packet.pts * stream.time_base)
        if packet.dts is not None and float(packet.dts * stream.time_base) > window.end + 1.0:
            break  # decoding order runs ahead of display order by far less than a second
        if not packet.is_discard and window.holds(begin):
            times.append(begin)
            _check_span(times, limits)
    if window.whole and stream.frames and packets < 0.9 * stream.frames:
        raise DataError(f"truncated video: it should hold {stream.frames} frames, and holds {packets}")
    return _checked_times(times, window)


def _decoded_times(
    container: av.container.InputContainer, stream: av.VideoStream, window: _Window, limits: VideoLimits
) -> np.ndarray:
    times: list[float] = []
    for frame in _decoded(container, stream, window, limits):
        times.append(frame.time)
        _check_span(times, limits)
    return _checked_times(times, window)


def _check_span(times: list[float], limits: VideoLimits) -> None:
    if len(times) > limits.max_frames:
        raise DataError(f"more than {limits.max_frames} frames; cut the video or raise the limit")
    if times[-1] - times[0] > limits.max_seconds:
        raise DataError(f"longer than {limits.max_seconds:g} s; cut the video or raise the limit")


def _checked_times(times: list[float], window: _Window) -> np.ndarray:
    if not times:
        raise DataError("the video has no frames" if window.whole else "the video has no frames between start and end")
    return np.sort(np.asarray(times, np.float64))


def _seek(container: av.container.InputContainer, stream: av.VideoStream, window: _Window) -> None:
    """Go to the key frame before the window, or to the start."""
    if window.whole or window.start <= 0:
        # The container was just opened, except where the packets were read before frames.
        container.seek(stream.start_time or 0, stream=stream, backward=True)
    else:
        container.seek(int(window.start / stream.time_base), stream=stream, backward=True)


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, window: _Window, limits: VideoLimits
) -> Iterator[av.VideoFrame]:
    """Yield the frames of ``window`` in display order; raises DataError at a damaged one."""
    clock = _Clock(limits)
    _seek(container, stream, window)
    for frame in container.decode(stream):
        clock.check()
        if frame.time is None:
            raise DataError("the video's frames carry no times")
        if frame.time >= window.end - TIME_TOLERANCE_S:
            return
        if not window.holds(frame.time):
            continue
        if frame.is_corrupt:
            raise DataError(f"broken video: damaged frame at {frame.time:.2f} s")
        _check_pixels(frame.width, frame.height, limits)  # a stream may change its size on the way
        yield frame


# --- geometry -------------------------------------------------------------------------------------------------------


def _shown_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Return (height, width) as a player shows the frame."""
    aspect = stream.sample_aspect_ratio
    width = frame.width * float(aspect) if aspect else frame.width
    height = frame.height
    if round(frame.rotation / 90) % 2:
        width, height = height, width
    return max(1, round(height)), max(1, round(width))


def _fitted(frame: av.VideoFrame, height: int, width: int, stream: av.VideoStream) -> np.ndarray:
    """Return the frame as uint8 (height, width, 3): turned upright, scaled to cover, cropped around the centre."""
    shown_height, shown_width = _shown_size(frame, stream)
    scale = max(height / shown_height, width / shown_width)
    # Rounding may leave one pixel too few on the side that decides the scale.
    cover_height, cover_width = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
    turns = round(frame.rotation / 90) % 4
    coded = (cover_width, cover_height) if turns % 2 else (cover_height, cover_width)
    # Averaging over the area is right for shrinking (no aliasing), cubic for enlarging.
    kind = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    image = frame.to_ndarray(format="rgb24", height=coded[0], width=coded[1], interpolation=kind)
    image = np.rot90(image, turns)
    top, left = (cover_height - height) // 2, (cover_width - width) // 2
    return image[top : top + height, left : left + width]
