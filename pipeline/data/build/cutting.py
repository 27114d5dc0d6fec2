"""The stage that cuts clips out of their videos into the build's store, and how any stage comes to a clip's frames.

A clip is decoded and encoded anew: a copy of the stream could begin only at a key frame. While its frames are at hand, they are
hashed and measured for the stages after it, which then need not decode them.
"""

from __future__ import annotations

from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from actors.settings import Positive, Section
from cluster.errors import DataError
from pipeline.data.build.files import placed
from pipeline.data.build.hashes import common_hash, frame_hashes, one_thread
from pipeline.data.build.measures import take
from pipeline.data.build.video import Build, Clip, Lost, Video
from pipeline.data.importers.clips import ClipSpec, copied_frames
from pipeline.data.reading import Source
from pipeline.data.video import decode_scaled, encode_mp4

HASHED_FPS = 8.0
"""Frames a second that are hashed: a clip that was cut elsewhere then has a frame near each of another's, in fast motion too."""
LOOKED_FPS = 25.0  # frames a second that are measured: a flash may last one
SIDE = 320  # pixels of the longer side of the frames that are looked at
MOST = 150  # frames of one clip that are looked at


def clip_frames(
    video: Video, clip: Clip, build: Build, *, fps: float, most: int = MOST, side: int = SIDE
) -> tuple[np.ndarray, float]:
    """Return frames of ``clip``, uint8 (T, H, W, 3), and how many of them are a second.

    They are of the stored clip where there is one, else of the source. All of the picture is in them, its longer side at most
    ``side`` pixels; they are spread evenly, some ``fps`` a second and ``most`` at most. Raises DataError.
    """
    if clip.stored:
        return _sampled(build.store.get(clip.stored), None, None, build, fps, most, side)
    return _sampled(placed(build.root, video.path), clip.start, clip.end, build, fps, most, side)


def _sampled(
    source: Source, start: float | None, end: float | None, build: Build, fps: float, most: int, side: int
) -> tuple[np.ndarray, float]:
    def count(times: np.ndarray) -> int:
        seconds = float(times[-1] - times[0]) * len(times) / max(1, len(times) - 1)  # the last one is on screen, too
        return max(1, min(most, len(times), round(seconds * fps)))

    frames, seconds = decode_scaled(
        source, lambda height, width: _scaled(height, width, side), count, build.limits, start=start, end=end
    )
    return frames, (len(frames) - 1) / seconds if seconds > 0 else fps


def _scaled(height: int, width: int, side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def note_hashes(clip: Clip, frames: np.ndarray, fps: float) -> None:
    """Note the perceptual hashes of ``frames``, which are ``fps`` a second, in ``clip``."""
    hashes = frame_hashes(frames[:: max(1, round(fps / HASHED_FPS))])
    clip.hashes, clip.phash = [int(value) for value in hashes], common_hash(hashes)


def note_measures(clip: Clip, frames: np.ndarray, fps: float) -> None:
    """Note the gates' measures of ``frames``, which are ``fps`` a second, in ``clip``; they are taken of a smaller copy."""
    number = max(1, min(MOST, len(frames), round(len(frames) * LOOKED_FPS / fps)))
    looked = frames[np.linspace(0, len(frames) - 1, number).round().astype(int)]
    height, width = _scaled(frames.shape[1], frames.shape[2], SIDE)
    if (height, width) != frames.shape[1:3]:
        looked = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in looked])
    clip.measures = take(looked, fps * (number - 1) / (len(frames) - 1) if number > 1 else fps)


class Cut:
    """Cut each clip [start, end) out of its video, once, and put it into the store."""

    name = "cut"

    class Settings(Section):
        """Settings of :class:`Cut`."""

        max_side: Annotated[Positive, Field(description="Pixels of the longer side of a clip.")] = ClipSpec.max_side
        max_fps: Annotated[float, Field(gt=0, description="Frames a second of a clip.")] = ClipSpec.max_fps
        max_frames: Annotated[
            Positive, Field(description="Frames of a clip; of a longer one fewer are kept, evenly.")
        ] = ClipSpec.max_frames

    def __init__(self, *, settings: Settings | None = None, build: Build) -> None:
        self.settings, self.build = settings or self.Settings(), build

    def setup(self) -> None:
        """Keep OpenCV to one thread."""
        one_thread()

    def __call__(self, video: Video) -> Video:
        """Return ``video`` with ``stored``, perceptual hashes and measures of its clips; what cannot be cut is lost."""
        kept: list[Clip] = []
        for clip in video.clips:
            try:
                if not clip.stored:
                    note_measures(clip, *put_clip(video, clip, self.build, self.spec))
                kept.append(clip)
            except DataError as error:
                told = f"{clip.start:.2f}–{clip.end:.2f} s of {video.path}: {error}"
                video.lost.append(Lost(self.name, f"clip {clip.index}", "unreadable", told))
        video.clips = kept
        return video

    @property
    def spec(self) -> ClipSpec:
        """How clips are stored."""
        return ClipSpec(**self.settings.model_dump(), limits=self.build.limits)


def put_clip(video: Video, clip: Clip, build: Build, spec: ClipSpec) -> tuple[np.ndarray, float]:
    """Cut ``clip`` out of ``video`` into the store, and note its name there and its hashes.

    Returns its frames, and how many of them are a second. Raises DataError.
    """
    frames, fps = copied_frames(placed(build.root, video.path), clip.start, clip.end, spec)
    clip.stored = build.store.put(encode_mp4(frames, fps, near_lossless=False))
    note_hashes(clip, frames, fps)
    return frames, fps


def narrowed(clip: Clip, start: float, end: float, *, least_s: float = 3.0, most_s: float = 5.0) -> tuple[float, float]:
    """Return the seconds of the video that ``clip`` is to keep, where [start, end) of the clip shows its step.

    ``start`` and ``end`` count from the clip's own beginning. A part shorter than ``least_s`` is widened around its middle, as
    far as the clip goes; of one longer than ``most_s`` the middle is kept. Raises DataError for a part that is not in the clip.
    """
    seconds = clip.end - clip.start
    if not (np.isfinite([start, end]).all() and 0 <= start < end and start < seconds):
        raise DataError(f"the part {start:g}–{end:g} s does not lie in a clip of {seconds:.2f} s")
    end = min(end, seconds)
    length = min(max(end - start, min(least_s, seconds)), most_s)
    begin = min(max(0.0, (start + end - length) / 2), seconds - length)
    return clip.start + begin, clip.start + begin + length


def trim(
    video: Video,
    clip: Clip,
    start: float,
    end: float,
    build: Build,
    spec: ClipSpec,
    *,
    least_s: float = 3.0,
    most_s: float = 5.0,
) -> None:
    """Cut ``clip`` anew to the part that :func:`narrowed` gives, out of the source, so that nothing is encoded twice.

    A clip that would stay within a tenth of a second of what it is stays. Raises DataError, and leaves ``clip`` as it was.
    """
    begin, until = narrowed(clip, start, end, least_s=least_s, most_s=most_s)
    if max(abs(begin - clip.start), abs(until - clip.end)) < 0.1:
        return
    part = Clip(clip.index, begin, until)
    put_clip(video, part, build, spec)
    clip.start, clip.end, clip.stored, clip.phash, clip.hashes = begin, until, part.stored, part.phash, part.hashes
