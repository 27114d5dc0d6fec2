"""The stage that keeps the videos of evaluation sets out of a build: by their names, and by what they show.

An evaluation set is a CSV of VANS-Data with its folder of clips, or a folder of shards. A video of it is known by its source id in
the names of clips, and by perceptual hashes: another codec, size or cut of an evaluation clip is found.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
from av.video.reformatter import Interpolation
from pydantic import Field

from actors.settings import Section
from cluster.errors import DataError
from cluster.harmless import short
from pipeline.data.build.cutting import HASHED_FPS
from pipeline.data.build.files import placed
from pipeline.data.build.hashes import SeenClips, frame_hashes, one_thread
from pipeline.data.build.video import Build, Lost, Video
from pipeline.data.geometry import orientation
from pipeline.data.importers.clips import confined
from pipeline.data.reading import Part, Source, VideoLimits, check_span, frames_of, opened
from pipeline.data.schema import open_shard, shard_paths
from pipeline.support.location import parse_location

SIDE = 64  # pixels of the squares that frames become before they are hashed
BATCH = 64  # frames that are hashed at a time
LONG = 6  # letters from which on a source id counts inside of a longer name


def video_hashes(source: Source, limits: VideoLimits | None = None, fps: float = HASHED_FPS) -> list[int]:
    """Return the perceptual hashes of all of ``source``, ``fps`` a second, in order; raises DataError."""
    limits = limits or VideoLimits()
    found: list[int] = []
    waiting: list[np.ndarray] = []
    times: list[float] = []
    due = -np.inf
    with (
        opened(source, limits) as (container, stream),
        closing(frames_of(container, stream, Part(), limits)) as pictures,
    ):
        for frame, shown in pictures:
            times.append(shown)
            check_span(times, limits)
            if shown < due - 1e-3:
                continue
            due = max(due + 1 / fps, shown) if np.isfinite(due) else shown + 1 / fps
            picture = frame.to_ndarray(format="rgb24", height=SIDE, width=SIDE, interpolation=Interpolation.AREA)
            waiting.append(orientation(frame).apply(picture))
            if len(waiting) == BATCH:
                found += map(int, frame_hashes(np.stack(waiting)))
                waiting.clear()
    if waiting:
        found += map(int, frame_hashes(np.stack(waiting)))
    return found


class Evaluation:
    """The clips of evaluation sets.

    ``sets``: CSV files with columns that end in ``_path``, and folders or URIs of shards. ``clips``: the folder that the
    paths in CSV files are relative to; without it their videos are known by name alone. Clips are read in threads, once. Raises
    DataError for a set that is neither, and for a clip that is missing or cannot be read: it would not be kept out.
    """

    def __init__(self, sets: Sequence[str], clips: str | Path | None = None, limits: VideoLimits | None = None) -> None:
        self.names: set[str] = set()
        self._seen: SeenClips[str] = SeenClips()
        limits = limits or VideoLimits()
        for each in sets:
            if str(each).lower().endswith(".csv"):
                found = list(_table(Path(each)))
                self.names |= set(found)
                if clips is not None:
                    self._see(Path(clips), found, limits)
                continue
            for name, data in _rows(each):
                self.names.add(name)
                if data is not None:
                    self._seen.add(name, video_hashes(data, limits))
        self._parts = {part for name in self.names for part in _parts(name)}

    def _see(self, root: Path, paths: Sequence[str], limits: VideoLimits) -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for path, hashes in zip(paths, threads.map(lambda path: video_hashes(confined(root, path), limits), paths)):
                self._seen.add(path, hashes)

    def named(self, name: str) -> bool:
        """Return whether the source id ``name`` is one of an evaluation clip: a part of its path, or within one between marks."""
        last = name.rpartition("/")[2]
        if name in self._parts or last in self._parts:
            return True
        if len(last) < LONG:
            return False
        inside = re.compile(rf"(?<![A-Za-z0-9]){re.escape(last)}(?![A-Za-z0-9])")
        return any(inside.search(part) for part in self._parts if len(part) > len(last) and last in part)

    def shown(self, hashes: Sequence[int]) -> str:
        """Return an evaluation clip that footage with ``hashes`` shows, in part or whole; empty where there is none."""
        return min(self._seen.find(hashes), default="")


def _table(path: Path) -> Iterator[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.reader(file)
            header = [name.strip().lstrip("\ufeff") for name in next(rows, [])]
            places = [place for place, name in enumerate(header) if name.endswith("_path")]
            if not places:
                raise DataError(
                    f"evaluation set {path} has no column that ends in _path, such as input_video_path: {short(header)}"
                )
            paths = (row[place].strip() for row in rows for place in places if place < len(row))
            yield from dict.fromkeys(found for found in paths if found)
    except (OSError, csv.Error) as error:
        raise DataError(f"cannot read the evaluation set {path}: {error}") from error


def _rows(folder: str) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, clip) of each clip of a folder of shards, and (name, None) of their sources."""
    for path in shard_paths(parse_location(folder)):
        with open_shard(path) as file:
            for batch in file.iter_batches(16, columns=["id", "meta", "input_video", "target_video"]):
                for row in batch.to_pylist():
                    named = json.loads(row["meta"]).get("video")
                    if isinstance(named, str):
                        yield named, None
                    yield row["id"], row["input_video"]
                    yield row["id"], row["target_video"]


def _parts(name: str) -> list[str]:
    """Return a clip's path, its parts, and its file's name without the suffix."""
    parts = name.replace("\\", "/").strip("/").split("/")
    return ["/".join(parts), *parts, parts[-1].rpartition(".")[0] or parts[-1]]


class Exclude:
    """Lose the videos of evaluation sets. It decodes a source once, as a whole, whatever clips of it are kept."""

    name = "exclude"

    class Settings(Section):
        """Settings of :class:`Exclude`."""

        sets: Annotated[
            list[str],
            Field(min_length=1, description="CSV files of VANS-Data, and folders or URIs of shards, to keep out."),
        ]
        clips: Annotated[
            str | None, Field(description="Folder of the CSV files' clips; without it, videos are known by name alone.")
        ] = None

    def __init__(self, *, settings: Settings, build: Build) -> None:
        self.settings, self.build = settings, build
        self._evaluation: Evaluation | None = None

    def setup(self) -> None:
        """Read and hash the clips of the evaluation sets; raises DataError."""
        one_thread()
        self._evaluation = Evaluation(self.settings.sets, self.settings.clips, self.build.limits)

    def __call__(self, video: Video) -> Video:
        """Return ``video``, without its clips where it is one of an evaluation set."""
        if self._evaluation is None:
            self.setup()
        assert self._evaluation is not None
        if not video.path:
            return video
        reason, told = "", ""
        if self._evaluation.named(video.name):
            reason, told = "evaluation", f"an evaluation clip is named by {short(video.name)}"
        else:
            try:
                shown = self._evaluation.shown(video_hashes(placed(self.build.root, video.path), self.build.limits))
                reason, told = ("evaluation", f"it shows the evaluation clip {short(shown)}") if shown else ("", "")
            except DataError as error:
                reason, told = "unreadable", str(error)
        if reason:
            video.lost.append(Lost(self.name, "video", reason, told))
            video.clips, video.pairs = [], []
        return video
