"""Decode dataset rows inside Ray Data's tasks, and turn decoded blocks into samples.

Responsible for what happens to one block of rows; no Ray import. Not responsible for the order (``source``).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.records import Sample
from cluster.errors import DataError, StorageError
from pipeline.data.reading import Source
from pipeline.data.schema import KINDS, SCHEMA, open_shard
from pipeline.data.video import PixelBudget, VideoLimits, decode_budget, decode_timed, decode_video
from pipeline.support.location import Uri, opened, parse_location, storage_errors

STORE_PAUSES_S = (
    2.0,
    10.0,
    30.0,
)  # before a store that failed is asked again; its client has tried for seconds each time
TEXT_COLUMNS = ("id", "kind", "question", "caption", "source", "meta", "answer")


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoShape:
    """The shapes that clips are decoded to; the fields are those of the ``video`` section of a run's configuration.

    ``context_frames``: how many frames of the input the artist gets; None is as many as the VLM sees. ``vlm_pixels``: least and most
    pixels of a frame that the VLM sees, in multiples of ``vlm_multiple``, instead of one size for all videos. ``vlm_fps``: the rate
    that the VLM is given of any video, instead of the video's own.
    """

    num_frames: int = 9
    height: int = 32
    width: int = 32
    fps: float = 8.0
    input_frames: int = 9
    vlm_height: int = 32
    vlm_width: int = 32
    context_frames: int | None = None
    vlm_pixels: tuple[int, int] | None = None
    vlm_multiple: int = 28
    vlm_fps: float | None = None

    @property
    def budget(self) -> PixelBudget | None:
        """The sizes in which the VLM sees videos; None where it is one."""
        return PixelBudget(*self.vlm_pixels, self.vlm_multiple) if self.vlm_pixels else None

    @property
    def vlm_most(self) -> int:
        """Most pixels of a frame that the VLM sees."""
        return self.vlm_pixels[1] if self.vlm_pixels else self.vlm_height * self.vlm_width

    def seen(self, video: Source, limits: VideoLimits) -> tuple[np.ndarray, float]:
        """Return what the VLM sees of ``video``, uint8 (T, H, W, 3), and the rate in frames per second that it is given of them."""
        if self.budget is not None:
            frames, seconds = decode_budget(video, self.input_frames, self.budget, limits)
        else:
            frames, seconds = decode_timed(video, self.input_frames, self.vlm_height, self.vlm_width, limits)
        return frames, self.vlm_fps or shown_rate(len(frames), seconds, self.fps)

    @property
    def context(self) -> int:
        """Frames of the input that the artist gets, at the rendered size."""
        return self.context_frames or self.input_frames

    @property
    def two_inputs(self) -> bool:
        """Whether the VLM sees frames of another number or size than the artist gets."""
        seen = self.input_frames, self.vlm_height, self.vlm_width
        return self.vlm_pixels is not None or seen != (self.context, self.height, self.width)

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        rendered = self.num_frames + (self.context if self.two_inputs else 0)
        return 3 * (self.input_frames * self.vlm_most + rendered * self.height * self.width)


@dataclass(frozen=True)
class Shard:
    """A shard as the decoding tasks know it; ``stamp`` tells a rewritten file from the one that stood there before."""

    path: str  # or URI
    stamp: int  # modification time, ns

    @classmethod
    def of(cls, path: Path | Uri) -> Shard:
        """Return the shard at ``path``; raises StorageError."""
        if isinstance(path, Path):
            return cls(str(path), path.stat().st_mtime_ns)
        store, inside = opened(path)
        with storage_errors(path):
            return cls(str(path), store.get_file_info(inside).mtime_ns or 0)


@dataclass(frozen=True)
class QuarantinedRow:
    """A row that could not be used, and why."""

    epoch: int
    position: int
    shard: str
    row: int  # within the shard
    id: str
    reason: str


def decode_block(
    batch: dict[str, np.ndarray], shards: tuple[Shard, ...], shape: VideoShape, limits: VideoLimits
) -> dict[str, np.ndarray]:
    """Decode the rows whose places ``batch`` holds; this is what the Ray Data tasks run.

    Adds the columns ``record`` (JSON of the text), ``input_frames``, ``target_frames``, ``fps`` and, where the VLM sees
    other frames than the artist gets, ``context_frames``; where the VLM's differ in size, ``input_frames`` are flat and padded, and
    ``input_size`` is their (height, width). ``error`` says why a row is unusable, or is empty.
    """
    rows = len(batch["shard"])
    out: dict[str, np.ndarray] = dict(batch)
    if shape.budget is None:
        out["input_frames"] = np.zeros((rows, shape.input_frames, shape.vlm_height, shape.vlm_width, 3), np.uint8)
    else:
        out["input_frames"] = np.zeros((rows, shape.input_frames * shape.vlm_most * 3), np.uint8)
        out["input_size"] = np.zeros((rows, 2), np.int64)
    out["target_frames"] = np.zeros((rows, shape.num_frames, shape.height, shape.width, 3), np.uint8)
    if shape.two_inputs:
        out["context_frames"] = np.zeros((rows, shape.context, shape.height, shape.width, 3), np.uint8)
    out["fps"] = np.full(rows, shape.fps, np.float64)
    records, errors = [], []
    for index in range(rows):
        text: dict[str, Any] = {}
        error = ""
        try:
            shard, group, offset = (int(batch[name][index]) for name in ("shard", "group", "offset"))
            group_rows = _read_group(shards[shard], group)
            if isinstance(group_rows, DataError):
                raise DataError(str(group_rows))
            row = group_rows[offset]
            text = {name: row.get(name) for name in TEXT_COLUMNS}
            _check_text(row)
            _decode_row(row, out, index, shape, limits)
        except DataError as found:
            error = str(found) or "unknown"
        records.append(json.dumps(text))
        errors.append(error)
    out["record"], out["error"] = np.array(records, object), np.array(errors, object)
    return out


@lru_cache(maxsize=4)
def _read_group(shard: Shard, group: int) -> list[dict[str, Any]] | DataError:
    """Return the rows of a row group; damage is returned, so that each of its rows is quarantined with the reason."""
    location = parse_location(shard.path)
    for pause_s in (*(STORE_PAUSES_S if isinstance(location, Uri) else ()), None):
        try:
            with open_shard(location, _footer(shard) if isinstance(location, Uri) else None) as file:
                return file.read_row_group(group).to_pylist()
        except FileNotFoundError:
            raise  # the storage is gone, which no row is to blame for
        except StorageError as error:
            if pause_s is None:
                raise
            log.warning("reading again in %g s: %s", pause_s, error)
            time.sleep(pause_s)
        except (pa.ArrowException, OSError) as error:
            return DataError(f"damaged row group {group}: {error}")
    raise AssertionError("unreachable")


@lru_cache(maxsize=64)
def _footer(shard: Shard) -> pq.FileMetaData:
    """Return the footer of a shard in a store, which is far away; raises as :func:`open_shard`."""
    with open_shard(parse_location(shard.path)) as file:
        return file.metadata


def _check_text(row: dict[str, Any]) -> None:
    for name in SCHEMA.names:
        if row.get(name) is None and not SCHEMA.field(name).nullable:
            raise DataError(f"{name} is missing")
    for name in ("id", "question", "caption"):
        if not row[name].strip():
            raise DataError(f"{name} is empty")
    if row["kind"] not in KINDS:
        raise DataError(f"kind {row['kind']!r} must be one of {', '.join(KINDS)}")


def _decode_row(
    row: dict[str, Any], out: dict[str, np.ndarray], index: int, shape: VideoShape, limits: VideoLimits
) -> None:
    """Write the frames of ``row`` to place ``index`` of ``out``."""
    try:
        video = row["input_video"]
        frames, rate = shape.seen(video, limits)
        if shape.budget is None:
            out["input_frames"][index] = frames
        else:
            out["input_frames"][index, : frames.size] = frames.ravel()
            out["input_size"][index] = frames.shape[1:3]
        if shape.two_inputs:
            frames = decode_video(video, shape.context, shape.height, shape.width, limits)
            out["context_frames"][index] = frames
    except DataError as error:
        raise DataError(f"input video: {error}") from error
    out["fps"][index] = rate
    try:
        video = row["target_video"]
        out["target_frames"][index] = decode_video(video, shape.num_frames, shape.height, shape.width, limits)
    except DataError as error:
        raise DataError(f"target video: {error}") from error


def shown_rate(count: int, seconds: float, otherwise: float) -> float:
    """Return the frames per second of ``count`` frames whose first and last are ``seconds`` apart.

    Frames that have no time between them get ``otherwise``.
    """
    # Six digits: far more than the time stamps of containers are good for.
    return float(f"{(count - 1) / seconds:.6g}") if seconds > 0 and count > 1 else otherwise


def block_items(
    block: dict[str, np.ndarray], shape: VideoShape, shards: Sequence[Path | Uri]
) -> Iterator[Sample | QuarantinedRow]:
    """Yield the rows of one decoded block (numpy batch of :meth:`SampleSource.dataset`) in order."""
    for index, error in enumerate(block["error"]):
        text = json.loads(block["record"][index])
        if error:
            shard = shards[int(block["shard"][index])].name
            epoch, position, row = (int(block[name][index]) for name in ("epoch", "position", "row"))
            yield QuarantinedRow(epoch, position, shard, row, text.get("id") or "?", str(error))
            continue
        sample = Sample(
            id=text["id"],
            kind=text["kind"],
            question=text["question"],
            caption=text["caption"],
            # Copies: a view would hold the whole block in the object store for as long as one sample lives.
            input_frames=_seen(block, index, shape),
            target_frames=np.array(block["target_frames"][index], np.uint8),
            fps=float(block["fps"][index]),
            meta=text["meta"],
            answer=text["answer"],
        )
        if shape.two_inputs:
            sample = replace(sample, context_frames=np.array(block["context_frames"][index], np.uint8))
        yield sample


def _seen(block: dict[str, np.ndarray], index: int, shape: VideoShape) -> np.ndarray:
    """Return a copy of what the VLM sees of row ``index``, uint8 (T, H, W, 3)."""
    row = block["input_frames"][index]
    if shape.budget is None:
        return np.array(row, np.uint8)
    height, width = (int(side) for side in block["input_size"][index])
    whole = shape.input_frames, height, width, 3
    return np.array(row[: math.prod(whole)], np.uint8).reshape(whole)
