"""A step's rollouts as one Parquet file: what a row holds, and how a file is written, found and read (docs/rollouts.md).

Pure but for the files. In which thread a file is written, and what happens where it cannot be, is ``behind``'s.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from pipeline.data.video import encode_mp4
from pipeline.stages.groups import Group, LeftOut, Member, RolloutBatch
from pipeline.tracking.experiences import Experiences, experiences_path, write_experiences

FOLDER = "rollouts"  # under the run's folder
FORMAT = 1
NOTE = b"vans.rollouts"  # the key of a file's JSON in Parquet's own metadata
Clips = Literal["all", "best_worst", "none"]

_NUMBERS = pa.map_(pa.string(), pa.float64())
SCHEMA = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("truth", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("lost", pa.string()),
        pa.field("text", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("scores", _NUMBERS),
        pa.field("diagnostics", _NUMBERS),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        pa.field("weights_version", pa.int64()),
        pa.field("clip_version", pa.int64()),
        pa.field("seeds", pa.map_(pa.string(), pa.int64())),
        pa.field("began", _NUMBERS),
        pa.field("seconds", _NUMBERS),
        pa.field("input_video", pa.binary()),
        pa.field("target_video", pa.binary()),
        pa.field("clip", pa.binary()),
    ]
)
"""One row is one trajectory; docs/rollouts.md says what each column is."""
VIDEOS = ("input_video", "target_video", "clip")

_NAME = re.compile(r"(?P<stage>\w+)-step(?P<step>\d{6,})\.parquet")
_DICTIONARY_BYTES = 1 << 30  # a group's videos stand once in a file, however large they are


@dataclass(frozen=True, eq=False)
class StepRollouts:
    """What one step leaves to be written: rows whose videos are still frames, uint8 (T, H, W, 3), and what is said of all of them.

    It holds no trajectory, so that what waits to be written holds no latents, but for the ``experiences`` of a run that is to
    be replayed.
    """

    stage: str
    step: int
    rows: tuple[dict[str, Any], ...]
    note: dict[str, Any] = field(default_factory=dict)
    fps: float = 8.0  # of clips and targets
    experiences: Experiences | None = None


@dataclass(frozen=True)
class StoredStep:
    """A file of rollouts, by its name; nothing is opened."""

    path: Path
    stage: str
    step: int


# --- rows ---------------------------------------------------------------------------------------------------------------


def step_rollouts(
    stage: str,
    step: int,
    batch: RolloutBatch,
    *,
    clips: Clips,
    group_size: int,
    weights: Mapping[str, float],
    figures: Mapping[str, float],
    fps: float,
    run_id: str = "",
    experiences: Experiences | None = None,
) -> StepRollouts:
    """Return the rows of ``batch``: every member of every group, every trajectory that was lost and every group or sample that
    was left out, with the reason.

    ``clips`` says whose clips are kept: all, those with a group's highest and lowest reward, or none; with none the input
    and the true clip are left out too. ``weights`` are those of the reward's components, ``figures`` the step's metrics,
    ``experiences`` what the learner read, where the step is to be replayed.
    """
    rows: list[dict[str, Any]] = []
    everyone = [
        member for group in (*batch.groups, *(left.group for left in batch.left_out)) for member in group.members
    ]
    start = min((span.began for member in everyone for span in member.spans.values()), default=0.0)
    for place, (group, totals, advantages) in enumerate(zip(batch.groups, batch.totals, batch.advantages, strict=True)):
        shown = _shown(totals, clips)
        of_group = _of_group(stage, step, place, group, clips)
        found = {
            member.index: of_group
            | _of_member(member, group, start)
            | {"reward": float(total), "advantage": float(advantage), "clip": _frames(member, i in shown)}
            for i, (member, total, advantage) in enumerate(zip(group.members, totals, advantages, strict=True))
        }
        rows += _with_lost(found, of_group, group, group_size)
    for place, left in enumerate(batch.left_out, start=len(batch.groups)):
        rows += _left_out(left, _of_group(stage, step, place, left.group, clips), clips, group_size, start)
    note = {"format": FORMAT, "run": run_id, "weights": dict(weights)}
    note["figures"] = {name: float(value) for name, value in figures.items()}
    return StepRollouts(stage, step, tuple(rows), note, fps, experiences)


def _shown(totals: np.ndarray, clips: Clips) -> set[int]:
    if clips == "none":
        return set()
    return set(range(len(totals))) if clips == "all" else {int(np.argmax(totals)), int(np.argmin(totals))}


def _frames(member: Member, shown: bool) -> np.ndarray | None:
    return member.clip.frames if shown and member.clip is not None else None


def _of_group(stage: str, step: int, place: int, group: Group, clips: Clips) -> dict[str, Any]:
    sample = group.sample
    return {
        "stage": stage,
        "step": step,
        "group": place,
        "sample_id": sample.id,
        "kind": sample.kind,
        "question": sample.question,
        "truth": sample.caption,
        "text": group.text or None,
        "input_fps": sample.fps,
        "input_video": None if clips == "none" else sample.context,
        "target_video": None if clips == "none" else sample.target_frames,
    }


def _of_member(member: Member, group: Group, start: float) -> dict[str, Any]:
    completion, clip = member.completion, member.clip
    return {
        "index": member.index,
        "text": (group.text or None) if completion is None else completion.text,
        "caption": member.caption,
        "tokens": None if completion is None else len(completion.token_ids),
        "finish_reason": None if completion is None else completion.finish_reason,
        "scores": member.scores.values,
        "diagnostics": member.scores.diagnostics,
        "weights_version": member.weights_version,
        "clip_version": None if clip is None else clip.weights_version,
        "seeds": member.seeds,
        "began": {name: span.began - start for name, span in member.spans.items()},
        "seconds": {name: span.seconds for name, span in member.spans.items()},
    }


def _left_out(
    left: LeftOut, of_group: dict[str, Any], clips: Clips, group_size: int, start: float
) -> list[dict[str, Any]]:
    """Return the rows of a group that nothing learns from; of a sample for which nothing was drawn a single one."""
    group = left.group
    if not group.members and not group.failures:
        return [of_group | {"index": 0, "lost": left.reason, "caption": left.caption}]
    found = {
        m.index: of_group | _of_member(m, group, start) | {"lost": left.reason, "clip": _frames(m, clips == "all")}
        for m in group.members
    }
    return _with_lost(found, of_group, group, group_size)


def _with_lost(
    found: dict[int, dict[str, Any]], of_group: dict[str, Any], group: Group, group_size: int
) -> list[dict[str, Any]]:
    """Return the rows of a group in the order of their index; a lost one's is the first that is free (reasons are in order)."""
    free = (i for i in range(max(group_size, len(found) + len(group.failures))) if i not in found)
    lost = {i: of_group | {"index": i, "lost": reason} for i, reason in zip(free, group.failures, strict=False)}
    return [row for _, row in sorted((found | lost).items())]


# --- files --------------------------------------------------------------------------------------------------------------


def write_step(folder: Path, rollouts: StepRollouts) -> Path:
    """Write ``rollouts`` into ``folder`` and return the file; one of the same stage and step is replaced.

    The file gets its name when it is whole, so a reader never sees a part of it; the experiences beside it come first. Raises
    OSError or pyarrow's error where the disk does not take it.
    """
    path = folder / f"{rollouts.stage}-step{rollouts.step:06d}.parquet"
    beside = folder / f".{path.name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    if rollouts.experiences is None:
        experiences_path(path).unlink(missing_ok=True)  # of the step as it was before the run was resumed
    else:
        write_experiences(experiences_path(path), rollouts.experiences)
    try:
        with beside.open("wb") as file:
            pq.write_table(
                _table(rollouts),
                file,
                compression="zstd",
                use_dictionary=True,
                dictionary_pagesize_limit=_DICTIONARY_BYTES,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _table(rollouts: StepRollouts) -> pa.Table:
    encoded: dict[tuple[int, float], bytes] = {}  # equal captions of a group share a clip, all its members an input

    def mp4(frames: np.ndarray | None, fps: float) -> bytes | None:
        if frames is None:
            return None
        key = (id(frames), fps)
        if key not in encoded:
            encoded[key] = encode_mp4(frames, fps, near_lossless=False)
        return encoded[key]

    def value(row: dict[str, Any], name: str) -> Any:
        if name in VIDEOS:
            return mp4(row.get(name), row["input_fps"] if name == "input_video" else rollouts.fps)
        found = row.get(name)
        return list(found.items()) if isinstance(found, Mapping) else found

    columns = [pa.array([value(row, f.name) for row in rollouts.rows], f.type) for f in SCHEMA]
    note = {NOTE: json.dumps(rollouts.note).encode()}
    return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(note))


def stored_steps(run: Path) -> list[StoredStep]:
    """Return the files of rollouts in the folder of a run, by stage and step."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted(
        (StoredStep(path, match["stage"], int(match["step"])) for path, match in found if match),
        key=lambda each: (each.stage, each.step),
    )


def prune(run: Path, stage: str, step: int, keep: int) -> None:
    """Keep of ``stage`` the newest ``keep`` files up to ``step``; later ones are of a run that is being repeated."""
    steps = [each for each in stored_steps(run) if each.stage == stage and each.step <= step]
    for each in steps[:-keep]:
        _remove(each)


def clear(run: Path) -> None:
    """Remove all rollouts from the folder of a run that begins anew."""
    for each in stored_steps(run):
        _remove(each)


def _remove(step: StoredStep) -> None:
    for path in (step.path, experiences_path(step.path)):
        path.unlink(missing_ok=True)


def read_step(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of a file, and its note: ``weights`` of the components, ``figures`` of the step, ``run``.

    Maps come back as dictionaries. Raises DataError for a file that is damaged, of another format or no file of rollouts.
    """
    with _opened(path) as (file, note):
        return file.read().to_pylist(maps_as_pydicts="strict"), note


def read_note(path: Path) -> dict[str, Any]:
    """Return the note of a file without its rows; raises DataError as :func:`read_step`."""
    with _opened(path) as (_, note):
        return note


@contextmanager
def _opened(path: Path) -> Iterator[tuple[pq.ParquetFile, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
            if NOTE not in metadata:
                raise DataError(f"{path}: no file of rollouts, its metadata lack {NOTE.decode()}")
            note = json.loads(metadata[NOTE])
            if note.get("format") != FORMAT:
                raise DataError(
                    f"{path}: rollouts of format {note.get('format')}, this version reads {FORMAT}; read it with pyarrow"
                )
            yield file, note
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged, or no Parquet file: {error}") from error
