"""Any system's answers as a folder: ``predictions.jsonl`` and mp4 files beside it (docs/evaluation.md).

Responsible for writing, reading and checking that folder. Not responsible for making answers (``predict``) or scoring
them (``score``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cluster.errors import DataError
from cluster.harmless import file_slug, parse_json, short
from pipeline.data.video import VideoLimits, decode_video, encode_mp4

FILE = "predictions.jsonl"
_KEYS = {"id", "index", "caption", "text", "video"}


@dataclass(frozen=True, eq=False)
class Prediction:
    """One answer. An unanswered question has an empty caption and neither frames nor video.

    ``index`` counts several answers to one sample (sampled captions). ``video`` is a file whose frames are decoded when
    they are needed; ``frames`` are uint8 (T, H, W, 3) RGB.
    """

    id: str
    caption: str
    text: str = ""  # the raw completion; empty where the system has none
    frames: np.ndarray | None = None
    index: int = 0
    video: Path | None = None

    def load(self, like: np.ndarray, limits: VideoLimits | None = None) -> Prediction:
        """Return this prediction with frames; a file is decoded to the frame count and size of ``like`` (T, H, W, 3).

        Raises DataError for a video that cannot be decoded, naming the file.
        """
        if self.frames is not None or self.video is None:
            return self
        try:
            return replace(self, frames=decode_video(self.video, like.shape[0], like.shape[1], like.shape[2], limits))
        except DataError as error:
            raise DataError(f"prediction {self.id!r}: {self.video}: {error}") from error

    def watched(self, like: np.ndarray, limits: VideoLimits | None = None) -> tuple[Prediction, str | None]:
        """As :meth:`load`; a video that cannot be decoded is none, and the second value says why."""
        try:
            return self.load(like, limits), None
        except DataError as error:
            return replace(self, video=None), str(error)


def write_predictions(folder: Path, predictions: Iterable[Prediction], fps: float) -> Path:
    """Write ``predictions`` as ``folder``/predictions.jsonl and ``folder``/videos/*.mp4; returns the jsonl's path.

    Videos are near lossless, so that scoring the folder gives the scores of the frames. Predictions that the folder holds
    already are replaced; the jsonl is written last, so that a folder without one is unfinished.
    """
    path = folder / FILE
    path.unlink(missing_ok=True)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prediction in enumerate(predictions):
        row: dict[str, Any] = {"id": prediction.id, "index": prediction.index, "caption": prediction.caption}
        row |= {"text": prediction.text, "video": None}
        if prediction.frames is not None or prediction.video is not None:
            row["video"] = f"videos/{number:06d}-{file_slug(prediction.id)}.mp4"
            (folder / row["video"]).write_bytes(_mp4(prediction, fps))
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _mp4(prediction: Prediction, fps: float) -> bytes:
    if prediction.frames is not None:
        return encode_mp4(prediction.frames, fps)
    assert prediction.video is not None
    return prediction.video.read_bytes()


def read_predictions(folder: Path) -> list[Prediction]:
    """Return the predictions in ``folder``; frames are not decoded yet (:meth:`Prediction.load`).

    Raises DataError that names the line for JSON that does not parse, a missing, unknown or mistyped key, an answer
    given twice, and a video that is missing or lies outside the folder.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {FILE}; docs/evaluation.md shows the format")
    found: dict[tuple[str, int], Prediction] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would end a line inside a caption too
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prediction = _parse(line, folder, where)
        key = (prediction.id, prediction.index)
        if key in found:
            raise DataError(
                f"{where}: id {key[0]!r} with index {key[1]} stands there twice; number several answers by 'index'"
            )
        found[key] = prediction
    if not found:
        raise DataError(f"{path} is empty")
    return list(found.values())


def check_cover(name: str, predictions: Sequence[Prediction], ids: Sequence[str]) -> dict[str, list[Prediction]]:
    """Return the predictions by sample id; those for other samples are left out.

    Raises DataError when one of ``ids`` has none: a system may not choose its questions.
    """
    by_id: dict[str, list[Prediction]] = {i: [] for i in ids}
    for prediction in predictions:
        if prediction.id in by_id:
            by_id[prediction.id].append(prediction)
    missing = [i for i, found in by_id.items() if not found]
    if missing:
        raise DataError(
            f"system {name!r} leaves out {len(missing)} of {len(ids)} samples, e.g. {', '.join(missing[:3])}; "
            "an unanswered question is a line with an empty caption and video null"
        )
    return by_id


def _parse(line: str, folder: Path, where: str) -> Prediction:
    try:
        row = parse_json(line)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, nested too deeply
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not {"id", "caption", "video"} <= set(row):
        raise DataError(f"{where}: needs an object with at least the keys id, caption and video, got {line[:80]!r}")
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise DataError(f"{where}: unknown keys {unknown}; known are {sorted(_KEYS)}")
    text, index = row.get("text") or "", row.get("index", 0)
    for key, value in (("id", row["id"]), ("caption", row["caption"]), ("text", text)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {key!r} must be text, not {short(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: {key!r} is not Unicode text: {error}") from error
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise DataError(f"{where}: 'index' must be a whole number from 0, not {short(index)}")
    video = None if row["video"] is None else _video_path(folder, row["video"], where)
    return Prediction(row["id"], row["caption"], text, None, index, video)


def _video_path(folder: Path, value: Any, where: str) -> Path:
    """Return the file that ``value`` names; nothing outside ``folder`` can be read, symbolic links included."""
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: 'video' must be a path relative to {folder} or null, not {short(value)}")
    relative = PurePosixPath(value)
    if relative.is_absolute() or ".." in relative.parts or "\\" in value or "\0" in value or ":" in value:
        raise DataError(f"{where}: 'video' must be a plain path inside {folder}, not {value!r}")
    try:
        path = (folder / relative).resolve()
        inside, regular = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a loop of links
        raise DataError(f"{where}: video {short(value)} is not a usable path: {error}") from error
    if not inside:
        raise DataError(f"{where}: video {value!r} leads outside {folder}")
    if not regular:
        raise DataError(f"{where}: there is no video {value!r} in {folder}")
    return path
