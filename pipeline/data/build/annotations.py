"""The source videos of a build: those that step annotations name, or all that lie in a folder.

Three formats are known, each by its structure: COIN's JSON, YouCook2's JSON, and JSON lines of ``video, start, end, label``.
Responsible for finding the files below the folder of videos, and for steps that cannot be right. No video is opened here:
whether a step lies inside of its video is for ``probing``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import DataError
from cluster.harmless import parse_json, short
from pipeline.data.build.files import SUFFIXES, VideoFiles
from pipeline.data.build.video import Clip, Lost, Video
from pipeline.support.location import Uri, parse_location

STAGE = "sources"  # the name that what is lost here is counted under
KNOWN = (
    'COIN ({"database": {VIDEO: {"annotation": [{"label", "segment"}]}}}), '
    'YouCook2 ({"database": {VIDEO: {"annotations": [{"sentence", "segment"}]}}}), '
    "JSON lines ({video, start, end, label})"
)

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Segment = Annotated[tuple[float, float], Field(strict=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Entry(BaseModel):
    """A part of a file of strangers: further keys are theirs."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _CoinStep(_Entry):
    label: Text
    segment: Segment


class _Coin(_Entry):
    recipe_type: int | str = ""
    duration: float = 0.0
    annotation: list[_CoinStep]


class _YouCook2Step(_Entry):
    sentence: Text
    segment: Segment


class _YouCook2(_Entry):
    recipe_type: int | str = ""
    duration: float = 0.0
    annotations: list[_YouCook2Step]


class _Line(_Entry):
    model_config = ConfigDict(extra="forbid")
    video: Text
    start: Finite
    end: Finite
    label: Text
    topic: str = ""


@dataclass
class _Annotated:
    """What the annotations say of a video."""

    name: str
    origin: str  # file that says so
    topic: str = ""
    seconds: float = 0.0  # 0: not stated
    steps: list[tuple[float, float, str]] = field(default_factory=list)


def annotated_videos(annotations: Sequence[str | Path], root: str | Path | Uri | VideoFiles) -> Iterator[Video]:
    """Yield the videos that the files ``annotations`` name, in their order, each with its steps as clips.

    A video's file is searched below the folder ``root``, or among files that were listed already: by its path, or by its name
    without a suffix, as COIN and YouCook2 name videos by id. A video that is not there is yielded all the same, without clips, with
    the reason in ``lost``; steps that end before they begin, or lie outside of the stated duration, are in ``lost`` too. Clips are
    in the order of their times, and ``index`` counts all steps, the lost ones too.

    The files are read when this is called. Raises DataError for a file of an unknown format, for a video that is annotated
    twice, and where none of the videos is there.
    """
    files = _listed(root)
    found: dict[str, _Annotated] = {}
    for path in map(Path, annotations):
        for name, entry in _read(path).items():
            if name in found:
                where = path.name if found[name].origin == path.name else f"{found[name].origin} and {path.name}"
                raise DataError(f"the video {short(name)} is annotated twice, in {where}: leave one of them out")
            found[name] = entry
    if not found:
        raise DataError(
            f"there is no annotated video in {', '.join(map(str, annotations)) or 'no file of annotations'}"
        )
    videos = [_video(order, entry, files) for order, entry in enumerate(found.values())]
    _require_some(videos, files.root)
    return iter(videos)


def unannotated_videos(root: str | Path | Uri | VideoFiles, listed: str | Path | None = None) -> Iterator[Video]:
    """Yield the videos below the folder ``root`` in the order of their paths, or those that the text file ``listed`` names.

    ``listed``: a path below ``root`` or an id a line. Raises DataError where there is none, and for a name that is listed twice.
    """
    files = _listed(root)
    if listed is None:
        videos = [Video(name, path, order=order) for order, (name, path) in enumerate(files.named())]
        if not videos:
            raise DataError(
                f"there is no video in {files.root}: files whose names end in {', '.join(sorted(SUFFIXES))} are looked for"
            )
        return iter(videos)
    try:
        lines = Path(listed).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of videos {listed}: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{listed} names the video {short(twice[0])} twice")
    if not names:
        raise DataError(f"{listed} names no video: a path below {root}, or an id, stands in each of its lines")
    videos = [_video(order, _Annotated(name, str(listed)), files) for order, name in enumerate(names)]
    _require_some(videos, files.root)
    return iter(videos)


def missing(videos: Iterable[Video]) -> str:
    """Return the sentence about the videos whose files were not found, the first of them named; empty where all were."""
    lost = [told for video in videos for told in video.lost if (told.stage, told.what) == (STAGE, "video")]
    return f"{len(lost)} videos cannot be read; the first: {lost[0].told}" if lost else ""


# --- formats --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, _Annotated]:
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"cannot read the annotations {path}: {error.strerror}") from error
    first = raw.lstrip().partition(b"\n")[0]
    line = _json_or_none(first)
    if isinstance(line, dict) and "database" not in line:
        return _read_lines(path, raw)
    try:
        whole = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON, nor JSON lines: {error}. Known annotations: {KNOWN}") from error
    database = whole.get("database") if isinstance(whole, dict) else None
    if not isinstance(database, dict) or not database:
        raise DataError(f"{path} holds {_described(whole)}, which is no known format of annotations: {KNOWN}")
    return {name: _entry(path, name, value) for name, value in database.items()}


def _json_or_none(text: bytes) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return None


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return (
            f"an object with the keys {', '.join(short(key) for key in list(value)[:6])}"
            if value
            else "an empty object"
        )
    return f"a list of {len(value)}" if isinstance(value, list) else f"{short(value)}"


def _entry(path: Path, name: str, value: Any) -> _Annotated:
    """Return one video of a JSON of COIN or YouCook2."""
    keys = set(value) if isinstance(value, dict) else set()
    try:
        if "annotation" in keys:
            coin = _Coin.model_validate(value)
            steps = [(*step.segment, step.label) for step in coin.annotation]
            return _Annotated(name, path.name, str(coin.recipe_type), coin.duration, steps)
        if "annotations" in keys:
            cook = _YouCook2.model_validate(value)
            steps = [(*step.segment, step.sentence) for step in cook.annotations]
            return _Annotated(name, path.name, str(cook.recipe_type), cook.duration, steps)
    except ValidationError as error:
        raise DataError(f"{path}: video {short(name)}: {_first_of(error)}") from error
    raise DataError(
        f"{path}: video {short(name)} is {_described(value)}, which is no known format of annotations: {KNOWN}"
    )


def _read_lines(path: Path, raw: bytes) -> dict[str, _Annotated]:
    found: dict[str, _Annotated] = {}
    for number, text in enumerate(raw.splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = _Line.model_validate(parse_json(text))
        except ValidationError as error:
            raise DataError(f"{path}:{number}: {_first_of(error)}. Known annotations: {KNOWN}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
        entry = found.setdefault(line.video, _Annotated(line.video, path.name, line.topic))
        entry.steps.append((line.start, line.end, line.label))
    return found


def _first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'entry'}: {first['msg']}"


# --- videos and their files -----------------------------------------------------------------------------------------


def _listed(root: str | Path | Uri | VideoFiles) -> VideoFiles:
    return root if isinstance(root, VideoFiles) else VideoFiles(parse_location(root))


def _video(order: int, entry: _Annotated, files: VideoFiles) -> Video:
    video = Video(entry.name, "", order=order, topic=entry.topic, seconds=entry.seconds)
    try:
        video.path = files.find(entry.name)
    except DataError as error:
        video.lost.append(Lost(STAGE, "video", "missing", str(error)))
        return video
    for index, (start, end, said) in enumerate(sorted(entry.steps)):
        label = " ".join(said.split())
        video.steps.append(label)
        fault = ""
        if end <= start:
            fault = f"it ends at {end:g} s, and begins at {start:g} s"
        elif start < 0 or (entry.seconds and start >= entry.seconds):
            fault = f"it begins at {start:g} s of a video that lasts {entry.seconds:g} s"
        if fault:
            video.lost.append(Lost(STAGE, f"clip {index}", "bad times", f"step {short(label)}: {fault}"))
        else:
            video.clips.append(Clip(index, start, end, label))
    return video


def _require_some(videos: Sequence[Video], root: Path | Uri) -> None:
    if not any(video.path for video in videos):
        raise DataError(
            f"none of the {len(videos)} videos is below {root}; {missing(videos)}. Videos are searched by path, or by their "
            f"id with a suffix such as .mp4"
        )
