"""The CSV files of VANS-Data: pairs for training and evaluation, and the last file of the procedural pipeline.

Their columns say which of the two a file is; further columns are ignored. The published files begin with a byte order mark, whichever
column is the first, and hold spreadsheet errors such as ``#NAME?``; such rows are rejected.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import DataError
from pipeline.data.importers.importing import Candidate, Rejected
from pipeline.data.importers.vans_row import Cell, Reading, make_row

COLUMNS = ("name", "input_video_path", "output_video_path", "ENG_Instruction", "ENG_GT_Caption")
"""A file of English pairs, as :func:`~pipeline.data.importers.cut.cut_pairs` writes one."""


@dataclass(frozen=True)
class Layout:
    """One of the published files: the column of each value, the columns that name a row, and the kind of its rows."""

    title: str
    columns: dict[str, str]
    """Without them a file is not of this layout. ``{language}`` stands for ENG or CHN."""
    thought: str
    """The column of the reasoning, which a file may lack."""
    named_by: tuple[str, ...]
    """The columns that name a row, of which a file may lack all: then the target's path does."""
    kind: str | None = None


LAYOUTS = (
    Layout(
        "pairs for training or evaluation",
        {
            "input": "input_video_path",
            "target": "output_video_path",
            "question": "{language}_Instruction",
            "caption": "{language}_GT_Caption",
        },
        thought="{language}_Think",
        named_by=("name",),
    ),
    Layout(
        "the procedural pipeline's last file",
        {
            "input": "input_video_path",
            "target": "target_video_path",
            "question": "Instruction",
            "caption": "GT_Caption",
        },
        thought="Think",
        named_by=("name", "input_id", "target_id"),
        kind="procedural",
    ),
)


def layout_of(path: Path, reading: Reading) -> Layout:
    """Return the layout of the CSV at ``path``; raises DataError, with the columns it has, where it is none of them."""
    if not path.is_file():
        raise DataError(f"no such CSV file: {path}")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            header = _header(next(csv.reader(file), []))
        except csv.Error as error:
            raise DataError(f"{path} is not a CSV file: {error}") from error
    lacking = {}
    for layout in LAYOUTS:
        missing = [c for c in _columns(layout, reading).values() if c not in header]
        if not missing:
            return layout
        lacking[layout.title] = f"for {layout.title} it has no column {', '.join(missing)}"
    found = ", ".join(header[:16])[:300]
    raise DataError(f"{path} is no file of VANS-Data: {'; '.join(lacking.values())}. It has: {found or 'nothing'}")


def read_rows(path: Path, reading: Reading) -> Iterator[Candidate | Rejected]:
    """Yield the rows of one CSV, each as a candidate or with the reason why it cannot be one."""
    layout = layout_of(path, reading)
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = _header(next(reader))
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:  # a field above csv's limit, for instance: the next line may be sound
                yield Rejected(path.name, reader.line_num, "?", f"not readable as CSV: {error}")
                continue
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                yield _row(dict(zip(header, cells)), header, layout, reading, path.name, reader.line_num)


def _header(cells: list[str]) -> list[str]:
    return [name.strip().lstrip("\ufeff") for name in cells]


def _columns(layout: Layout, reading: Reading) -> dict[str, str]:
    return {value: column.format(language=reading.language.upper()) for value, column in layout.columns.items()}


def _row(
    cells: dict[str, str], header: list[str], layout: Layout, reading: Reading, source: str, line: int
) -> Candidate | Rejected:
    columns = _columns(layout, reading)
    thought = layout.thought.format(language=reading.language.upper())
    if cells.get(thought, "").strip():  # a row without one can be rewarded, and not be imitated
        columns["thought"] = thought
    values = {value: Cell(column, cells.get(column, "").strip()) for value, column in columns.items()}
    naming = [column for column in layout.named_by if column in header]
    parts = [cells.get(column, "").strip() for column in naming]
    if naming and not all(parts):
        empty = naming[parts.index("")]
        return Rejected(source, line, "_".join(filter(None, parts)) or "?", f"{empty} is empty")
    target = values["target"].text.replace("\\", "/")
    target = target.lstrip("./")
    name = "_".join(parts) if naming else target.rpartition(".")[0] or target
    return make_row(source, line, name, values, reading, layout.kind)
