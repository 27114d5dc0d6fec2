"""A video file as a sequence of pictures with times: which stream, from where on, when each is shown.

Responsible for opening files of strangers within limits, for choosing the stream, and for times that hold in every
container, with an index or without. Not responsible for what is made of the pictures (``video``, ``geometry``).
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from cluster.errors import DataError
from pipeline.data.boxes import check_mp4_index
from pipeline.support.location import Uri, open_file, size_of

# Containers that hold a video themselves. Playlists (hls, concat, dash, …) are left out: they open other files.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,ivf,gif,mxf,wav"
TIME_TOLERANCE_S = 1e-3  # containers that count in milliseconds round their timestamps by half of this
COMPLETE = 0.9  # of what a file says it holds; with less, it is cut off
STEPS_BACK_S = (0.0, 5.0, 30.0)  # before the wanted time, where a seek for it went too far

_FAR_S = 1e9  # later than any picture
_NO_INDEX = {"mpegts", "mpeg"}  # after a seek, some of their times are guesses
_STATES_DURATION = {
    "avi",
    "matroska",
    "flv",
    "asf",
    "mxf",
}  # in the header, so that it survives when the file is cut off
_PICTURES = {"mjpeg", "png", "bmp", "gif", "webp", "tiff", "jpeg2000", "jpegls"}  # codecs that covers are made with
_BARE_RATES = (0.0, 480.0)  # a bare stream that states more frames a second means ticks of a clock
_REWRITE = "ffmpeg -i FILE -c copy new.mp4"


@dataclass(frozen=True)
class VideoLimits:
    """What is accepted from one source video."""

    max_pixels: int = 3840 * 2160  # per frame
    max_frames: int = 20_000  # in the part that is read
    max_seconds: float = 3600.0  # of the part that is read
    max_bytes: int = 512 << 20  # of the file
    max_decode_s: float = 300.0  # of this machine's time, for one pass over the file


Source = bytes | str | Path | Uri


@dataclass(frozen=True)
class Part:
    """What is read of a stream: the frames that begin in [start, end), in the stream's own seconds.

    Reading begins at the start of the file; or where a seek for the time ``seek`` (s) ends; or after the first ``skip``
    packets of the stream, which are passed over without being decoded.
    """

    start: float = -math.inf
    end: float = math.inf
    seek: float | None = None
    skip: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is all of the stream."""
        return math.isinf(self.start) and math.isinf(self.end)

    def holds(self, second: float) -> bool:
        """Return whether a frame that begins at ``second`` belongs to the part."""
        return self.start - TIME_TOLERANCE_S <= second < self.end - TIME_TOLERANCE_S


# --- files and streams ----------------------------------------------------------------------------------------------


@contextmanager
def _broken_video() -> Iterator[None]:
    """Turn whatever PyAV raises into a DataError."""
    try:
        yield
    except (av.FFmpegError, OSError, EOFError, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"broken video: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def opened(source: Source, limits: VideoLimits) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open ``source`` at its start, within ``limits``, and choose the stream.

    Raises DataError, also for PyAV's errors; StorageError where the store of a URI fails.
    """
    source = Path(source) if isinstance(source, str) else source
    size = len(source) if isinstance(source, bytes) else size_of(source)
    if size is None:
        raise DataError(f"no such video file: {source!s}")
    if size > limits.max_bytes:
        raise DataError(f"the file has {size} bytes; at most {limits.max_bytes} are accepted")
    if size == 0:
        raise DataError("the file is empty")
    # ffmpeg looks at frames while it opens a file: it must know the limit, or memory is gone before we can ask.
    # It rounds the width up to its own alignment, so the limit that is exact is checked by us.
    guard = {"max_pixels": str(2 * limits.max_pixels)}
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", **guard}
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_file(source)
    except OSError as error:
        raise DataError(f"cannot read {source!s}: {error.strerror}") from error
    with _broken_video(), file:
        check_mp4_index(file, size)
        with av.open(file, options=options) as container:
            films = _films(container)
            if len(films) == 1:
                yield container, _ready(films[0], guard, limits)
                return
            chosen = max(films, key=_rank(container, films, limits)).index  # the first of several that are equal
        file.seek(0)
        with av.open(file, options=options) as container:
            yield container, _ready(container.streams[chosen], guard, limits)


def _films(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Return the streams that are no covers (attached pictures, thumbnails); raises DataError where there are none."""
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    films = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not films:
        only = "only a cover picture, and " if container.streams.video else ""
        raise DataError(f"the file has {only}no video stream")
    return films


def _rank(
    container: av.container.InputContainer, films: list[av.VideoStream], limits: VideoLimits
) -> Callable[[av.VideoStream], tuple[int, ...]]:
    """Return what the largest of is the film among ``films``; reads packets, until each has two.

    More than one frame goes before one, a codec for moving pictures before one for stills (covers are not always marked),
    a stream that the file marks as default before the others, a larger picture before a smaller one.
    """
    packets = dict.fromkeys((stream.index for stream in films), 0)
    clock = _Clock(limits)
    for packet in _packets(container):
        clock.check()
        if packet.stream.index in packets:
            packets[packet.stream.index] += bool(packet.size)
        if min(packets.values()) > 1:
            break

    def rank(stream: av.VideoStream) -> tuple[int, ...]:
        context = stream.codec_context
        if context is None:  # no decoder
            return (0,)
        moving = context.codec.canonical_name not in _PICTURES
        default = bool(stream.disposition & Disposition.default)
        return (1, packets[stream.index] > 1, moving, default, context.width * context.height)

    return rank


def _packets(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """Yield the packets of the streams that were there when the file was opened, those that flush decoders last."""
    try:
        yield from container.demux()
    except IndexError:  # PyAV may want to flush a stream that appeared on the way; it comes behind all others
        return


def _ready(stream: av.VideoStream, guard: dict[str, str], limits: VideoLimits) -> av.VideoStream:
    """Return ``stream`` ready to be decoded; raises DataError where it cannot be, or may not."""
    context = stream.codec_context
    if context is None:
        raise DataError("the video's codec is not known")
    if not context.width * context.height:
        raise DataError(f"the frames have no size, or more than the {limits.max_pixels} pixels that are accepted")
    check_pixels(context.width, context.height, limits)
    if not stream.time_base:
        raise DataError("the video's frames carry no times")
    context.thread_count = 1  # many decoders share the machine's cores
    context.options = guard
    return stream


def check_pixels(width: int, height: int, limits: VideoLimits) -> None:
    """Raise DataError for frames above the limit."""
    if width * height > limits.max_pixels:
        raise DataError(
            f"frames of {width}x{height} are {width * height} pixels; at most {limits.max_pixels} are accepted"
        )


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


def check_span(times: list[float], limits: VideoLimits) -> None:
    """Raise DataError where the times (s) so far are too many or too far apart."""
    if len(times) > limits.max_frames:
        raise DataError(f"more than {limits.max_frames} frames; cut the video or raise the limit")
    if times[-1] - times[0] > limits.max_seconds:
        raise DataError(f"longer than {limits.max_seconds:g} s; cut the video or raise the limit")


# --- where reading begins -------------------------------------------------------------------------------------------


def part_of(source: Source, limits: VideoLimits, start: float | None, end: float | None) -> Part:
    """Return the part [start, end) seconds of ``source``, counted from its first frame. Raises DataError.

    Where reading begins is a guess, and is tried: a seek lands where it lands, and the pictures before a key frame may need
    an earlier one. So a guess counts only if the first picture that can be decoded from there is shown no later than
    ``start``. Otherwise the next guess lies further back, and the last one is the beginning of the file.
    """
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise DataError(f"{name}={value} must be a time in seconds, 0 or later")
    if start is not None and end is not None and end <= start:
        raise DataError(f"end={end} must be later than start={start}")
    if start is None and end is None:
        return Part()
    first = _first_time(source, limits, Part())
    begin, until = first + (start or 0.0), math.inf if end is None else first + end
    before = [begin - back for back in STEPS_BACK_S if begin - back > first + TIME_TOLERANCE_S]
    for guess in _guesses(source, limits, before):
        try:
            if _first_time(source, limits, guess) <= begin + TIME_TOLERANCE_S:
                return replace(guess, start=begin, end=until)
        except DataError:  # it cannot be read from there
            continue
    return Part(begin, until)


def _guesses(source: Source, limits: VideoLimits, before: list[float]) -> list[Part]:
    """Return where reading may begin, so that the pictures of each of the times ``before`` (s, descending) are reached."""
    with opened(source, limits) as (container, stream):
        if container.format.name not in _NO_INDEX and not _is_bare(container):
            return [Part(seek=second) for second in before]
        keys: list[tuple[int, float]] = []
        clock = _Clock(limits)
        number = 0
        for packet in _packets(container) if before else ():
            clock.check()
            if packet.stream.index != stream.index:
                continue
            if packet.is_keyframe and packet.pts is not None:
                keys.append((number, float(packet.pts * stream.time_base)))
                if keys[-1][1] > before[0] + 1.0:
                    break
            number += 1
    last = [max((number for number, shown in keys if shown <= second), default=0) for second in before]
    return [Part(skip=number) for number in last if number]


def _enter(container: av.container.InputContainer, stream: av.VideoStream, part: Part) -> Iterator[av.Packet]:
    """Yield the packets of all streams from where reading begins; the container was just opened."""
    if part.seek is not None:
        place = math.floor(min(part.seek, _FAR_S) / stream.time_base)  # ffmpeg counts in 64 bits
        container.seek(place, stream=stream, backward=True)
    skip = part.skip
    for packet in _packets(container):
        if packet.stream.index == stream.index and skip:
            skip -= 1
            continue
        yield packet


def _first_time(source: Source, limits: VideoLimits, part: Part) -> float:
    """Return when the first picture is shown that can be decoded from where ``part`` begins."""
    with opened(source, limits) as (container, stream), closing(frames_of(container, stream, part, limits)) as pictures:
        for _, shown in pictures:
            return shown
    raise DataError(nothing_decoded(part))


def nothing_decoded(part: Part) -> str:
    """Return what is said where a part gives no picture."""
    return "no frame could be decoded" if part.whole else "the video has no frames between start and end"


def _is_bare(container: av.container.InputContainer) -> bool:
    """Return whether the file is a coded stream without a container, which has no times."""
    return bool(container.format.flags & av.format.Flags.no_timestamps.value)


# --- times and pictures ---------------------------------------------------------------------------------------------


class _Times:
    """When each frame of a stream is shown, in seconds, asked in the order in which frames are shown.

    Most containers state it. AVI and bare streams number the packets, in coding order: there a frame has the time at which
    it leaves the decoder. The last frames leave after the last packet and follow at the stream's rate, as do all frames of
    a bare stream without numbers, where the stream itself states its rate.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, part: Part) -> None:
        self._from_start = part.seek is None and not part.skip
        self._bare = _is_bare(container)
        self.coded_order = self._bare or container.format.name == "avi"
        self._rate = stream.codec_context.framerate if self._bare else stream.guessed_rate
        self._codec = stream.codec_context.name
        self._last: float | None = None
        self._step: float | None = None

    def of(self, frame: av.VideoFrame) -> float:
        """Return the time of the next frame; raises DataError where there is none, or where it goes back."""
        stamp = frame.dts if self.coded_order else frame.pts
        if stamp is not None:
            found = float(stamp * frame.time_base)
        elif self._last is not None:
            found = self._last + self._interval()
        elif self.coded_order and self._from_start:
            found = 0.0
        else:
            raise DataError("the video's frames carry no times")
        if self._last is not None:
            if found < self._last - TIME_TOLERANCE_S:
                raise DataError(
                    f"broken video: the time of its frames goes back, from {self._last:.2f} s to {found:.2f} s. If it was "
                    f"joined from several files, join them anew with an editor, or with ffmpeg's concat"
                )
            self._step = found - self._last or self._step
        self._last = found
        return found

    def _interval(self) -> float:
        if self._step is None:
            low, high = _BARE_RATES
            if not self._rate or not low < self._rate <= high:
                raise DataError(
                    f"it is a bare {self._codec} stream, which states no frame rate. Put it into a container, with the rate "
                    f"that it was recorded at, for example: ffmpeg -framerate 25 -i FILE new.mp4"
                )
            self._step = float(1 / self._rate)
        return self._step


def packet_times(
    container: av.container.InputContainer, stream: av.VideoStream, part: Part, limits: VideoLimits
) -> np.ndarray | None:
    """Return the sorted times (s) in ``part`` that the packets promise, or None where they carry none.

    The stream was just opened. Raises DataError for a file that holds less than it says, and above ``limits``.
    """
    promise = not _Times(container, stream, part).coded_order
    times: list[float] = []
    packets, until = 0, -math.inf
    clock = _Clock(limits)
    for packet in _enter(container, stream, part):
        clock.check()
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None and packet.time_base:
            until = max(until, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index or (packet.size == 0 and packet.dts is None):  # that flushes decoders
            continue
        packets += 1
        if packet.dts is not None and float(packet.dts * stream.time_base) > part.end + 1.0:
            break  # decoding order runs ahead of display order by far less than a second
        promise = promise and packet.pts is not None
        if promise and packet.size and not packet.is_discard and part.holds(float(packet.pts * stream.time_base)):
            times.append(float(packet.pts * stream.time_base))
            check_span(times, limits)
    if part.whole:
        _check_complete(container, stream, packets, until)
    return np.sort(np.asarray(times)) if promise and times else None


def _check_complete(container: av.container.InputContainer, stream: av.VideoStream, packets: int, until: float) -> None:
    """Raise DataError where a file that was read to its end held fewer packets, or less time, than it says.

    ``until``: when its last packet ends (s).
    """
    names = set(container.format.name.split(","))
    stated_s = container.duration / av.time_base if container.duration and _STATES_DURATION & names else 0.0
    if (
        "avi" in names
    ):  # its header counts dropped frames, too; ffmpeg makes up another duration for a file that is cut off
        stated_s = float(stream.frames * stream.time_base)
    else:
        # An mp4's header counts also what an edit list leaves out, and counts nothing where the file is in fragments.
        stated = len(stream.index_entries) if "mp4" in names else stream.frames
        if packets < COMPLETE * stated:
            raise DataError(f"truncated video: it should hold {stated} frames, and holds {packets}")
    if packets > 1:
        held_s = until - min(0.0, (container.start_time or 0) / av.time_base)
        held_s *= packets / (packets - 1)  # the last frame is on screen, too
        if stated_s and held_s < COMPLETE * stated_s:
            raise DataError(
                f"truncated video: it should last {stated_s:.2f} s, and ends after {max(0.0, held_s):.2f} s"
            )


def frames_of(
    container: av.container.InputContainer, stream: av.VideoStream, part: Part, limits: VideoLimits
) -> Generator[tuple[av.VideoFrame, float], None, None]:
    """Yield the frames of ``part`` in the order in which they are shown, and when (s); raises DataError at a damaged one.

    The stream was just opened. What stands before the first key frame cannot be decoded, and is passed over.
    """
    clock, times = _Clock(limits), _Times(container, stream, part)
    # An h264 decoder knows where its pictures are whole, with key frames or with rows of them renewed in turn.
    patient = stream.codec_context.name == "h264"
    begun = False
    for packet in _enter(container, stream, part):
        clock.check()
        if packet.stream.index != stream.index:
            continue
        begun = begun or packet.is_keyframe
        if not begun and not patient and packet.size:
            continue
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:
            if begun:
                raise
            continue
        for frame in decoded:
            begun = True
            shown = times.of(frame)
            if shown >= part.end - TIME_TOLERANCE_S:
                return
            if not part.holds(shown):
                continue
            if frame.is_corrupt:
                raise DataError(f"broken video: damaged frame at {shown:.2f} s")
            check_pixels(frame.width, frame.height, limits)  # a stream may change its size on the way
            yield frame, shown
