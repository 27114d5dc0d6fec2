"""The text files that the predictive pipeline of VANS-Data writes: one for each pair of videos, in two languages.

A file holds the sections ``[ENG Instruction]``, ``[ENG Think]``, ``[ENG GT Caption]`` and the same with ``CHN``. The draft names its
videos in two first lines; the reviewed file does not, and its number is that of a row of the CSV that the pairs were made from.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.errors import DataError
from pipeline.data.importers.importing import Candidate, Rejected
from pipeline.data.importers.vans_row import Cell, Reading, make_row

PAIR_COLUMNS = ("video1_path", "video2_path")
_SECTION = re.compile(r"\[(CHN|ENG) (Instruction|Think|GT Caption)\]")
_VIDEO = re.compile(r"^Video([12]):[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_NUMBER = re.compile(r"(\d+)$")
_REFUSED = "PROHIBITED_CONTENT"
_MAX_BYTES = 1 << 20
_VALUES = {"question": "Instruction", "caption": "GT Caption", "thought": "Think"}


def read_pairs(path: Path) -> dict[int, tuple[str, str]]:
    """Return the videos of each row of the CSV at ``path``, the first row being 0; raises DataError where it is no such file."""
    if not path.is_file():
        raise DataError(f"no such CSV file of pairs: {path}")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            rows = list(csv.DictReader(file))
        except csv.Error as error:
            raise DataError(f"{path} is not a CSV file: {error}") from error
    if not rows or not set(PAIR_COLUMNS) <= set(rows[0]):
        raise DataError(f"{path} must have the columns {' and '.join(PAIR_COLUMNS)} and at least one row")
    first, second = PAIR_COLUMNS
    return {number: (row[first] or "", row[second] or "") for number, row in enumerate(rows)}


def read_texts(
    paths: Sequence[Path], reading: Reading, videos: Mapping[int, tuple[str, str]]
) -> Iterator[Candidate | Rejected]:
    """Yield the rows of ``paths``, each as a candidate or with the reason why it cannot be one."""
    for path in paths:
        if path.stat().st_size > _MAX_BYTES:
            yield Rejected(path.name, 1, path.stem, f"larger than {_MAX_BYTES} bytes: not one answer of the pipeline")
            continue
        yield _row(path, path.read_text(encoding="utf-8-sig", errors="replace"), reading, videos)


def _row(path: Path, text: str, reading: Reading, videos: Mapping[int, tuple[str, str]]) -> Candidate | Rejected:
    def reject(reason: str) -> Rejected:
        return Rejected(path.name, 1, path.stem, reason)

    if text.strip() == _REFUSED:
        return reject("the model that was to review it refused")
    sections = _sections(text, reading.language.upper())
    if missing := [name for name in _VALUES.values() if name not in sections]:
        return reject(f"has no section [{reading.language.upper()} {missing[0]}]")
    named = dict(_VIDEO.findall(text))
    if len(named) < 2:
        number = _NUMBER.search(path.stem)
        pair = videos.get(int(number[1])) if number else None
        if pair is None:
            told = "does not name its videos; give the CSV that the pairs were made from with --pairs"
            return reject(told if not videos else f"names no videos, and --pairs has no row {number and number[1]}")
        named = dict(zip("12", pair))
    cells = {value: Cell(f"[{reading.language.upper()} {name}]", sections[name]) for value, name in _VALUES.items()}
    cells |= {"input": Cell("the first video", named["1"]), "target": Cell("the second video", named["2"])}
    return make_row(path.name, 1, path.stem, cells, reading, "predictive")


def _sections(text: str, language: str) -> dict[str, str]:
    """Return the text of each section of ``language``; of one that stands there twice, the last, which is the corrected one."""
    marks = list(_SECTION.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)] if marks else []
    return {
        mark[2]: text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True) if mark[1] == language
    }
