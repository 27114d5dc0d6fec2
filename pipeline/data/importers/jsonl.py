"""Import a plain manifest: one JSON object a line, each an (input, next event) pair.

``{"id": …, "kind": …, "question": …, "caption": …, "input": …, "target": …, "answer": …, "meta": {…}}``; ``id`` (the
line number), ``kind`` (inferred), ``answer`` and ``meta`` may be left out. ``input`` and ``target`` are paths relative
to the clips folder, or ``{"path": …, "start": seconds, "end": seconds}`` for a part of a longer video.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.records import SampleKind
from cluster.errors import DataError
from cluster.harmless import parse_json
from pipeline.data.importers.clips import ClipSpec, Span
from pipeline.data.importers.importing import Candidate, ImportReport, Rejected, manifest_plan, run_import
from pipeline.support.location import Uri

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a longer video."""

    model_config = ConfigDict(extra="forbid", strict=True)
    path: Text
    start: Seconds | None = None
    end: Seconds | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Part:
        if self.end is not None and self.end <= (self.start or 0.0):
            raise ValueError(f"end={self.end} must be later than start={self.start or 0.0}")
        return self


class Entry(BaseModel):
    """One line of the manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: Text | None = None
    kind: SampleKind | None = None
    question: Text
    caption: Text
    input: Text | Part
    target: Text | Part
    answer: Text | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


def import_jsonl(
    manifests: str | Path | Sequence[str | Path],
    clips: str | Path,
    out: str | Path | Uri,
    *,
    spec: ClipSpec | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> ImportReport:
    """Write the entries of ``manifests`` (one, or several) with their clips, found under ``clips``, as Parquet shards in ``out``.

    Lines that fail are listed with their reasons in ``out/_rejected.csv``. An import that was interrupted is continued by the
    same call. Raises DataError when nothing could be imported.
    """
    paths = [Path(path) for path in ([manifests] if isinstance(manifests, str | Path) else manifests)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"no such manifest: {path}")
    plan = manifest_plan("import-jsonl", paths)
    items = (item for path in paths for item in read_entries(path))
    return run_import(items, clips, out, plan=plan, spec=spec, workers=workers, quiet=quiet)


def read_entries(path: Path) -> Iterator[Candidate | Rejected]:
    """Yield the lines of a manifest, each as a candidate or with the reason why it cannot be one."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            text = raw.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                yield _entry(text, path.name, line)


def _entry(text: bytes, source: str, line: int) -> Candidate | Rejected:
    try:
        value = parse_json(text)
        entry = Entry.model_validate(value)
        meta = json.dumps(entry.meta, ensure_ascii=False, allow_nan=False)
        for words in (entry.id or "", entry.question, entry.caption, entry.answer or "", meta):
            words.encode()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'entry'}: {item['msg']}" for item in error.errors()
        )
        name = value.get("id") if isinstance(value, dict) else None
        return Rejected(source, line, str(name or "?"), problems)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, nested too deeply
        return Rejected(source, line, "?", f"not a JSON object: {error}")
    return Candidate(
        source=source,
        line=line,
        id=entry.id or f"line-{line:06d}",
        question=entry.question.strip(),
        caption=entry.caption.strip(),
        input=_span(entry.input),
        target=_span(entry.target),
        kind=entry.kind,
        answer=entry.answer,
        meta=meta,
    )


def _span(value: str | Part) -> Span:
    return Span(value) if isinstance(value, str) else Span(value.path, value.start, value.end)
