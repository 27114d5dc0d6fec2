"""``vans data import-vans``: VANS-Data in every layout that its authors published, and a folder of clips.

CSV files of pairs, and the files that their two pipelines write: the procedural one a CSV (``vans_csv`` reads both), the predictive
one text files (``vans_texts``). What a row says is in ``row``; loading clips and writing shards is ``importing``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from pipeline.data.importers.clips import ClipSpec
from pipeline.data.importers.importing import Candidate, ImportReport, Rejected, manifest_plan, run_import
from pipeline.data.importers.vans_csv import layout_of, read_rows
from pipeline.data.importers.vans_row import LANGUAGES, Reading
from pipeline.data.importers.vans_texts import read_pairs, read_texts
from pipeline.data.schema import KINDS
from pipeline.support.location import Uri


def import_vans(
    sources: Sequence[str | Path],
    clips: str | Path,
    out: str | Path | Uri,
    *,
    kind: str | None = None,
    language: str = "eng",
    strip: str = "",
    pairs: str | Path | None = None,
    spec: ClipSpec | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> ImportReport:
    """Write the rows of ``sources``, with the clips that they name under ``clips``, as Parquet shards in ``out``.

    ``sources``: CSV files, text files of the predictive pipeline, or folders of such text files.
    ``kind``: of all rows; None takes what the layout says, and else infers it from each question.
    ``language``: ``eng`` or ``chn``, where a source holds both.
    ``strip``: what paths begin with on their authors' machine, and not under ``clips``.
    ``pairs``: for text files that do not name their videos, the CSV (``video1_path``, ``video2_path``) that they were made from.

    Rows that fail are listed with their reasons in ``out/_rejected.csv``. An import that was interrupted is continued by the
    same call. Raises DataError for a source that is none of these, and when nothing could be imported.
    """
    if kind is not None and kind not in KINDS:
        raise DataError(f"kind {kind!r} must be one of {', '.join(KINDS)}")
    if language not in LANGUAGES:
        raise DataError(f"language {language!r} must be one of {', '.join(LANGUAGES)}")
    reading = Reading(kind, language, strip)
    tables, texts = _sorted_out([Path(source) for source in sources])
    for table in tables:
        layout_of(table, reading)  # a wrong file is refused before anything is read
    videos = read_pairs(Path(pairs)) if pairs is not None else {}
    plan = vans_plan(sources, kind, language=language, strip=strip, pairs=pairs)
    return run_import(
        _rows(tables, texts, reading, videos), clips, out, plan=plan, spec=spec, workers=workers, quiet=quiet
    )


def vans_plan(
    sources: Sequence[str | Path],
    kind: str | None = None,
    *,
    language: str = "eng",
    strip: str = "",
    pairs: str | Path | None = None,
) -> dict[str, Any]:
    """Return what an import of ``sources`` is told apart by."""
    tables, texts = _sorted_out([Path(source) for source in sources])
    files = [*tables, *texts, *([Path(pairs)] if pairs is not None else [])]
    return manifest_plan("import-vans", files, kind=kind, language=language, strip=strip)


def _rows(
    tables: Iterable[Path], texts: Sequence[Path], reading: Reading, videos: dict[int, tuple[str, str]]
) -> Iterator[Candidate | Rejected]:
    for table in tables:
        yield from read_rows(table, reading)
    yield from read_texts(texts, reading, videos)


def _sorted_out(sources: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the CSV files and the text files among ``sources``, folders opened; texts in the order of their names."""
    tables: list[Path] = []
    texts: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = sorted(source.glob("*.txt"))
            if not found:
                raise DataError(f"{source} holds no text files (*.txt) of the predictive pipeline")
            texts += found
        elif not source.is_file():
            raise DataError(f"no such CSV file, text file or folder of text files: {source}")
        else:
            (texts if source.suffix.lower() == ".txt" else tables).append(source)
    return tables, texts
