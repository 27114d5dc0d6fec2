"""Import VANS-Data-100K: CSVs of questions and captions, and a folder of clips.

The columns are ``name, input_video_path, output_video_path, ENG_Instruction, ENG_GT_Caption``; others are ignored. The
published files begin with a byte order mark and hold spreadsheet errors such as ``#NAME?``; such rows are rejected.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from pipeline.data.importers.clips import ClipSpec, Span
from pipeline.data.importers.importing import Candidate, ImportReport, Rejected, manifest_plan, run_import
from pipeline.data.schema import KINDS
from pipeline.support.location import Uri

COLUMNS = ("name", "input_video_path", "output_video_path", "ENG_Instruction", "ENG_GT_Caption")
SPREADSHEET_ERRORS = ("#NAME?", "#REF!", "#VALUE!", "#N/A", "#DIV/0!", "#NULL!", "#NUM!")


def import_vans(
    csvs: Sequence[str | Path],
    clips: str | Path,
    out: str | Path | Uri,
    *,
    kind: str | None = None,
    spec: ClipSpec | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> ImportReport:
    """Write the rows of ``csvs``, with the clips that they name under ``clips``, as Parquet shards in ``out``.

    ``kind``: of all rows, or None to infer it from each question (what-if and what-happens questions are predictive).
    Rows that fail are listed with their reasons in ``out/_rejected.csv``. An import that was interrupted is continued by the
    same call. Raises DataError for a file that is not such a CSV, and when nothing could be imported.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind {kind!r} must be one of {', '.join(KINDS)}")
    paths = [Path(path) for path in csvs]
    for path in paths:
        _check_header(path)
    items = (item for path in paths for item in read_rows(path, kind))
    return run_import(items, clips, out, plan=vans_plan(paths, kind), spec=spec, workers=workers, quiet=quiet)


def vans_plan(csvs: Sequence[Path], kind: str | None = None) -> dict[str, Any]:
    """Return what an import of ``csvs`` is told apart by."""
    return manifest_plan("import-vans", csvs, kind=kind)


def _check_header(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"no such CSV file: {path}")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        try:
            header = [name.strip() for name in next(csv.reader(file), [])]
        except csv.Error as error:
            raise DataError(f"{path} is not a CSV file: {error}") from error
    if missing := [name for name in COLUMNS if name not in header]:
        found = ", ".join(header[:12])[:200]
        raise DataError(f"{path} has no column {', '.join(missing)}; it has: {found or 'nothing'}")


def read_rows(path: Path, kind: str | None = None) -> Iterator[Candidate | Rejected]:
    """Yield the rows of one CSV, each as a candidate or with the reason why it cannot be one."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader)]
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:  # a field above csv's limit, for instance: the next line may be sound
                yield Rejected(path.name, reader.line_num, "?", f"not readable as CSV: {error}")
                continue
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                yield _row(dict(zip(header, cells)), path.name, reader.line_num, kind)


def _row(cells: dict[str, str], source: str, line: int, kind: str | None) -> Candidate | Rejected:
    values = {column: cells.get(column, "").strip() for column in COLUMNS}
    name = values["name"]
    for column, value in values.items():
        if not value:
            return Rejected(source, line, name or "?", f"{column} is empty")
        if value.upper() in SPREADSHEET_ERRORS:
            return Rejected(source, line, name, f"{column} is {value}, a spreadsheet's error and not a value")
        if "\N{REPLACEMENT CHARACTER}" in value:
            return Rejected(source, line, name, f"{column} is not UTF-8 text")
    return Candidate(
        source=source,
        line=line,
        id=name,
        question=values["ENG_Instruction"],
        caption=values["ENG_GT_Caption"],
        input=Span(values["input_video_path"]),
        target=Span(values["output_video_path"]),
        kind=kind,
    )
