"""The part that all importers share: load the clips of candidate rows, write shards, list what was rejected and why."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path


from cluster.errors import DataError
from pipeline import terminal
from pipeline.data.importers.clips import ClipSpec, Span, load_clip
from pipeline.data.schema import Row, ShardWriter
from pipeline.location import Uri, local_path, parse_location, write_bytes
from pipeline.text import printable

REJECTED = "_rejected.csv"  # readers of Parquet folders pass over names that begin with an underscore
_PREDICTIVE = re.compile(
    r"\bwhat\s+(if|happens?|will|would|might|could)\b|\bif\b|\bhappens?\b|\bpredict", re.IGNORECASE
)


@dataclass(frozen=True)
class Candidate:
    """A row as a manifest states it, before its clips are looked at."""

    source: str  # file that names it
    line: int
    id: str
    question: str
    caption: str
    input: Span
    target: Span
    kind: str | None = None  # None: inferred from the question
    answer: str | None = None
    meta: str = "{}"


@dataclass(frozen=True)
class Rejected:
    """A row that was not imported, and why."""

    source: str
    line: int
    id: str
    reason: str


@dataclass
class ImportReport:
    """What an import did; ``copied`` and ``embedded`` count clips, the others rows."""

    folder: Path | Uri
    accepted: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    copied: int = 0
    embedded: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def summary(self, reasons: int = 8) -> str:
        """Return a few lines for people."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"{self.folder}: {self.accepted} rows imported ({kinds or 'none'}); {self.embedded} clips stored as they "
            f"were, {self.copied} as smaller copies; {len(self.rejected)} rows rejected"
        ]
        lines += [f"  {item.source}:{item.line} {item.id}: {item.reason}" for item in self.rejected[:reasons]]
        if len(self.rejected) > reasons:
            lines.append(f"  … and {len(self.rejected) - reasons} more")
        if self.rejected:
            lines.append(f"all of them: {self.folder / REJECTED}")
        return "\n".join(lines)


def infer_kind(question: str) -> str:
    """Return ``predictive`` for what-if and what-happens questions, else ``procedural`` (the next step of a task)."""
    return "predictive" if _PREDICTIVE.search(question) else "procedural"


def run_import(
    items: Iterable[Candidate | Rejected],
    clips: str | Path,
    out: str | Path | Uri,
    *,
    spec: ClipSpec | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> ImportReport:
    """Write the candidates whose clips load to shards in ``out``, the others to ``out/_rejected.csv``, in their order.

    ``workers`` threads decode (default: one a core, 8 at most). Prints a summary unless ``quiet``. Raises DataError
    when the clips folder is missing, ``out`` holds a dataset already, or no row could be imported; StorageError where
    ``out`` is a URI and its store fails.
    """
    clips, out, spec = local_path(clips), parse_location(out), spec or ClipSpec()
    if not clips.is_dir():
        raise DataError(f"clips folder {clips} does not exist")
    report, used = ImportReport(out), Counter[str]()
    with ShardWriter(out) as writer:
        for item, loaded in _loaded(items, clips, spec, workers or min(8, os.cpu_count() or 1)):
            if isinstance(loaded, Rejected):
                report.rejected.append(loaded)
                continue
            assert isinstance(item, Candidate)
            (input_video, input_kept), (target_video, target_kept) = loaded
            used[item.id] += 1
            # One clip may be asked several questions under one name.
            name = item.id if used[item.id] == 1 else f"{item.id}#{used[item.id]}"
            kind = item.kind or infer_kind(item.question)
            origin = f"{item.source}:{item.line}"
            try:
                writer.write(
                    Row(
                        name,
                        kind,
                        item.question,
                        item.caption,
                        input_video,
                        target_video,
                        origin,
                        item.meta,
                        item.answer,
                    )
                )
            except DataError as error:
                report.rejected.append(Rejected(item.source, item.line, item.id, str(error)))
                continue
            report.accepted += 1
            report.kinds[kind] += 1
            report.embedded += input_kept + target_kept
            report.copied += (not input_kept) + (not target_kept)
    _write_rejected(out / REJECTED, report.rejected)
    if not report.accepted:
        raise DataError(f"nothing could be imported.\n{report.summary()}")
    if not quiet:
        terminal.console().print(printable(report.summary()), highlight=False, markup=False)
    return report


Loaded = tuple[tuple[bytes, bool], tuple[bytes, bool]] | Rejected


def _loaded(
    items: Iterable[Candidate | Rejected], clips: Path, spec: ClipSpec, workers: int
) -> Iterator[tuple[Candidate | Rejected, Loaded]]:
    """Yield each item with its clips or its rejection, in order, a few loaded ahead in threads (PyAV frees the GIL)."""

    def load(item: Candidate | Rejected) -> Loaded:
        if isinstance(item, Rejected):
            return item
        part = "input"
        try:
            first = load_clip(clips, item.input, spec)
            part = "target"
            return first, load_clip(clips, item.target, spec)
        except DataError as error:
            return Rejected(item.source, item.line, item.id, f"{part} clip: {error}")

    waiting: deque[tuple[Candidate | Rejected, Future[Loaded]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append((item, pool.submit(load, item)))
            if len(waiting) > 2 * workers:
                ready, future = waiting.popleft()
                yield ready, future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()


def _write_rejected(path: Path | Uri, rejected: list[Rejected]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = [item.name for item in fields(Rejected)]
    writer.writerow(names)
    writer.writerows([getattr(item, name) for name in names] for item in rejected)
    write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"))
