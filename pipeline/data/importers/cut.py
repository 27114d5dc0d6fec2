"""Cut long videos into (input, next event) pairs, by a list of times that a person wrote.

Responsible for the clip files and the VANS-style CSV that names them; importing those is ``vans_csv``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from actors.records import SampleKind
from cluster.errors import DataError
from cluster.harmless import parse_json
from pipeline.data.importers.clips import ClipSpec, composed, copy_clip
from pipeline.data.importers.vans_csv import COLUMNS

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PairCut(BaseModel):
    """One pair: which seconds of which file are the input, which are the next event, and what is asked and true."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    file: Annotated[str, Field(min_length=1)]
    input: tuple[Seconds, Seconds]
    target: tuple[Seconds, Seconds]
    kind: SampleKind
    question: Annotated[str, Field(min_length=1)]
    caption: Annotated[str, Field(min_length=1)]
    split: Annotated[str, Field(pattern=r"^[a-z]+$")] = "train"

    @model_validator(mode="after")
    def _in_order(self) -> PairCut:
        for part in ("input", "target"):
            start, end = getattr(self, part)
            if end <= start:
                raise ValueError(f"{part}: its end, {end} s, must be later than its start, {start} s")
        if self.target[0] < self.input[1]:
            raise ValueError(f"the next event begins at {self.target[0]} s, before the input ends at {self.input[1]} s")
        return self


def read_cuts(path: Path) -> list[PairCut]:
    """Return the pairs of a JSON list; raises DataError naming the entry and the key."""
    try:
        cuts = TypeAdapter(list[PairCut]).validate_python(parse_json(path.read_bytes()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: entry {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON list: {error}") from error
    names = [cut.name for cut in cuts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: the name {twice[0]!r} stands there twice")
    return cuts


def cut_pairs(
    cuts: Sequence[PairCut], videos: Mapping[str, Path], clips: Path, table: Path, spec: ClipSpec | None = None
) -> list[str]:
    """Write two mp4s per pair to ``clips`` and the CSV that names them, as VANS-Data-100K's do, to ``table``.

    ``videos``: file name of a cut, in any Unicode form → where that video lies. Returns why pairs could not be cut; the others
    are written.
    """
    spec, videos = spec or ClipSpec(), {composed(name): path for name, path in videos.items()}
    failed: list[str] = []
    clips.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for cut in cuts:
            video = videos.get(composed(cut.file))
            if video is None:
                failed.append(f"pair {cut.name!r} is cut from {cut.file!r}, which is not among the videos given")
                continue
            names: list[str] = []
            for part, (start, end) in (("input", cut.input), ("output", cut.target)):
                try:
                    data = copy_clip(video, start, end, spec)
                except DataError as error:
                    failed.append(f"pair {cut.name!r}, {part}, {start}–{end} s of {cut.file}: {error}")
                    break
                names.append(f"{cut.name}_{part}.mp4")
                (clips / names[-1]).write_bytes(data)
            else:
                writer.writerow([cut.name, *names, cut.question, cut.caption])
    return failed
