"""What one row of VANS-Data says, whichever file it stands in: checks, the answer's text, paths, language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.data.importers.clips import Span
from pipeline.data.importers.importing import Candidate, Rejected
from rewards.format import DEFAULT

SPREADSHEET_ERRORS = ("#NAME?", "#REF!", "#VALUE!", "#N/A", "#DIV/0!", "#NULL!", "#NUM!")
LANGUAGES = {"eng": "en", "chn": "zh"}
"""The languages of the data, as its columns and sections call them, and as ``meta`` does (ISO 639-1)."""


@dataclass(frozen=True)
class Reading:
    """How rows are to be read: the kind of all of them (None: as the layout or the question says), language, prefix of paths."""

    kind: str | None = None
    language: str = "eng"
    strip: str = ""


@dataclass(frozen=True)
class Cell:
    """A value and the column or section that it stands in, for messages."""

    where: str
    text: str


def make_row(
    source: str, line: int, name: str, cells: Mapping[str, Cell], reading: Reading, kind: str | None
) -> Candidate | Rejected:
    """Return the row of ``cells``: question, caption, input, target and, where there is one, thought; or why it cannot be one."""
    for cell in cells.values():
        if not cell.text:
            return Rejected(source, line, name or "?", f"{cell.where} is empty")
        if cell.text.upper() in SPREADSHEET_ERRORS:
            return Rejected(source, line, name, f"{cell.where} is {cell.text}, a spreadsheet's error and not a value")
        if "\N{REPLACEMENT CHARACTER}" in cell.text:
            return Rejected(source, line, name, f"{cell.where} is not UTF-8 text")
    caption, answer = cells["caption"].text, None
    if thought := cells.get("thought"):
        answer = DEFAULT.write(thought.text, caption)
        if not DEFAULT.reward(answer):
            return Rejected(source, line, name, f"{thought.where} or the caption holds a tag of answers, such as <ans>")
    language = LANGUAGES[reading.language]
    return Candidate(
        source=source,
        line=line,
        id=name,
        question=cells["question"].text,
        caption=caption,
        input=Span(_path(cells["input"].text, reading.strip)),
        target=Span(_path(cells["target"].text, reading.strip)),
        kind=reading.kind or kind,
        answer=answer,
        meta="{}" if language == "en" else json.dumps({"language": language}),
    )


def _path(text: str, strip: str) -> str:
    """Return the path below the clips folder: the files begin theirs with ``./``, ``/`` or a folder of their authors' machine."""
    text = text.replace("\\", "/")
    if strip and text.startswith(strip.replace("\\", "/")):
        text = text[len(strip) :]
    return text.lstrip("/")
