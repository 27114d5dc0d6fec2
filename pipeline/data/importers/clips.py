"""From a clip somewhere under a folder to the mp4 bytes of a dataset row.

Responsible for: keeping paths inside that folder, cutting, and deciding between the original bytes and a smaller copy.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import av
import numpy as np

from cluster.errors import DataError
from pipeline.data.reading import Source
from pipeline.data.video import VideoInfo, VideoLimits, decode_scaled, decode_video, encode_mp4, pace_of, probe


@dataclass(frozen=True)
class Span:
    """A clip as a manifest names it: a path relative to the clips folder, or [start, end) seconds of it."""

    path: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class ClipSpec:
    """How clips are stored. Training reads 33 frames of 352x640 at most, so larger originals only cost space."""

    max_side: int = 640  # pixels of the longer side of a copy
    max_fps: float = 30.0  # frames per second of a copy
    max_frames: int = 256  # of a copy; a longer clip is thinned out in time, not cut
    embed_bytes: int = 8 << 20  # an mp4/h264 up to this size is stored as it is …
    embed_side: int = 1280  # … unless its longer side is larger than this
    limits: VideoLimits = field(default_factory=VideoLimits)


def confined(root: Path, relative: str) -> Path:
    """Return the regular file ``relative`` under ``root``; raises DataError for anything that leads elsewhere.

    Refused: absolute paths, drive letters, ``..``, and links whose target lies outside ``root``. Letters with marks may be
    written in another Unicode form than on disk (see :func:`composed`).
    """
    text = relative.strip().replace("\\", "/")
    pure = PurePosixPath(text)
    if not text or "\0" in text:
        raise DataError(f"{relative!r} is not a path")
    if pure.is_absolute() or PureWindowsPath(text).drive or ".." in pure.parts:
        raise DataError(f"{relative!r} must be a path inside the clips folder: not absolute, without '..'")
    try:
        found = _on_disk(root, pure).resolve()
        inside, regular = found.is_relative_to(root.resolve()), found.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # name too long, loop of links
        raise DataError(f"{relative!r} is not a usable path: {error}") from error
    if not inside:
        raise DataError(f"{relative!r} is a link that leads out of the clips folder")
    if not regular:
        raise DataError(f"no such clip: {relative!r}")
    return found


def composed(name: str) -> str:
    """Return ``name`` in Unicode's form NFC: "é" is one code point in it, and two in NFD, which Macs write to disks.

    Two names that are equal in this form look the same, and are taken for the same.
    """
    return unicodedata.normalize("NFC", name)


def _on_disk(root: Path, relative: PurePosixPath) -> Path:
    """Return ``root / relative`` with each part spelled as its folder spells it; raises DataError where two could be meant."""
    path = root
    for part in relative.parts:
        if not part.isascii() and not os.path.lexists(path / part):
            alike = _names(str(path), path.stat().st_mtime_ns).get(composed(part), [part]) if path.is_dir() else [part]
            if len(alike) > 1:
                raise DataError(f"{str(relative)!r} could be any of {len(alike)} files, whose names look the same")
            part = alike[0]
        path = path / part
    return path


@lru_cache(maxsize=256)
def _names(folder: str, stamp: int) -> dict[str, list[str]]:
    """Return the names in ``folder`` that are not ASCII, by their composed form; ``stamp``: its modification time."""
    found = defaultdict(list)
    for name in os.listdir(folder):
        if not name.isascii():
            found[composed(name)].append(name)
    return dict(found)


def load_clip(root: Path, span: Span, spec: ClipSpec | None = None) -> tuple[bytes, bool]:
    """Return (mp4 bytes, whether they are the original's) of ``span``, having decoded all of it. Raises DataError."""
    spec = spec or ClipSpec()
    path = confined(root, span.path)
    if span.start is None and span.end is None:
        info = probe(path, spec.limits)
        if _embeddable(info, path.stat().st_size, spec):
            data = path.read_bytes()
            decode_video(data, 2, 16, 16, spec.limits)  # a clip that is damaged further in is found now
            return data, True
    return copy_clip(path, span.start, span.end, spec), False


def copy_clip(source: Source, start: float | None, end: float | None, spec: ClipSpec) -> bytes:
    """Return the part [start, end) of ``source`` as mp4 bytes of constant frame rate, upright, within ``spec``."""
    return encode_mp4(*copied_frames(source, start, end, spec), near_lossless=False)


def copied_frames(source: Source, start: float | None, end: float | None, spec: ClipSpec) -> tuple[np.ndarray, float]:
    """Return the frames of :func:`copy_clip`, uint8 (T, H, W, 3), and how many of them are a second."""

    def size(height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, spec.max_side / max(width, height))
        # Even sizes, because copies are yuv420p: small, and played everywhere.
        return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))

    def count(times: np.ndarray) -> int:
        # A clip with pauses is copied at the pace of its other frames, or these would be thinned out by the pauses' length.
        # Frames are spread from the first to the last one, so that n of them show n - 1 intervals.
        span = float(times[-1] - times[0])
        return min(spec.max_frames, round(span * min(spec.max_fps, pace_of(times))) + 1)

    frames, seconds = decode_scaled(source, size, count, spec.limits, start=start, end=end)
    return frames, (len(frames) - 1) / seconds if len(frames) > 1 and seconds > 0 else 1.0


def _embeddable(info: VideoInfo, size: int, spec: ClipSpec) -> bool:
    small = size <= spec.embed_bytes and max(info.width, info.height) <= spec.embed_side
    return small and "mp4" in info.container and av.codec.Codec(info.codec, "r").canonical_name == "h264"
