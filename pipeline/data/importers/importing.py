"""The part that all importers share: load the clips of candidate rows, write shards, list what was rejected and why."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.harmless import printable
from pipeline.data.importers.clips import ClipSpec, Span, load_clip
from pipeline.data.schema import Row, ShardWriter, writer_plan
from pipeline.support import terminal
from pipeline.support.location import Uri, local_path, parse_location, write_bytes
from rewards.text import comparable

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


def manifest_plan(command: str, manifests: Sequence[Path], **more: Any) -> dict[str, Any]:
    """Return what an import of ``manifests`` is told apart by: their names and contents, and what else decides its rows."""
    files = []
    for path in manifests:
        with path.open("rb") as file:
            files.append({"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
    return {"command": command, "manifests": files, **more}


def import_plan(plan: Mapping[str, Any], clips: Path, spec: ClipSpec) -> dict[str, Any]:
    """Return the whole plan of an import: that of its manifests, the clips folder, and how clips are stored."""
    return writer_plan({**plan, "clips": str(clips.resolve()), "spec": asdict(spec)})


def run_import(
    items: Iterable[Candidate | Rejected],
    clips: str | Path,
    out: str | Path | Uri,
    *,
    plan: Mapping[str, Any] | None = None,
    spec: ClipSpec | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> ImportReport:
    """Write the candidates whose clips load to shards in ``out``, the others to ``out/_rejected.csv``, in their order.

    ``plan``: what ``items`` come from (:func:`manifest_plan`). With one, an import that was interrupted is continued by the
    same call: shards that are whole are kept, and the result is that of an undisturbed import. ``workers`` threads decode
    (default: one a core, 8 at most). Prints a summary unless ``quiet``. Raises DataError when the clips folder is missing,
    ``out`` holds a dataset already or a part of another one, or no row could be imported; StorageError where ``out`` is a
    URI and its store fails.
    """
    clips, out, spec = local_path(clips), parse_location(out), spec or ClipSpec()
    if not clips.is_dir():
        raise DataError(f"clips folder {clips} does not exist")
    progress = _Progress(ImportReport(out))
    report, used, console = progress.report, progress.used, terminal.console()
    whole = None if plan is None else import_plan(plan, clips, spec)
    with ShardWriter(out, plan=whole, progress=progress.take) as writer:
        rest = iter(items)
        if writer.count:
            progress.take_up(writer.kept, rest)
            if not quiet:
                told = f"{out}: {writer.count} rows of an interrupted import are kept; it goes on after them"
                console.print(printable(told), highlight=False, markup=False)
        for item, loaded in _loaded(rest, clips, spec, workers or min(8, os.cpu_count() or 1)):
            progress.items += 1
            if isinstance(loaded, Rejected):
                progress.reject(loaded)
                continue
            assert isinstance(item, Candidate)
            if not comparable(item.caption):
                told = "caption has no letter and no digit, so no answer could be compared with it"
                progress.reject(Rejected(item.source, item.line, item.id, told))
                continue
            (input_video, input_kept), (target_video, target_kept) = loaded
            # One clip may be asked several questions under one name.
            again = used[item.id] + 1
            name = item.id if again == 1 else f"{item.id}#{again}"
            kind = item.kind or infer_kind(item.question)
            origin = f"{item.source}:{item.line}"
            try:
                row = Row(
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
                writer.require_new(row)
            except DataError as error:
                progress.reject(Rejected(item.source, item.line, item.id, str(error)))
                continue
            progress.accept(item.id, kind, input_kept + target_kept)
            writer.write(row)  # may end a shard, and with it writes down the progress up to this row
        if report.accepted:
            _write_rejected(out / REJECTED, report.rejected)
    if not report.accepted:
        _write_rejected(out / REJECTED, report.rejected)
        raise DataError(f"nothing could be imported.\n{report.summary()}")
    if not quiet:
        terminal.console().print(printable(report.summary()), highlight=False, markup=False)
    return report


@dataclass
class _Progress:
    """How far an import is, and what is noted of it with each shard: all since the shard before."""

    report: ImportReport
    used: Counter[str] = field(default_factory=Counter)  # accepted rows by the id in the manifest
    items: int = 0  # candidates that have been dealt with
    _since: dict[str, Any] = field(default_factory=lambda: _nothing())

    def accept(self, name: str, kind: str, embedded: int) -> None:
        """Count a row of two clips, ``embedded`` of which are stored as they were."""
        self.used[name] += 1
        self.report.accepted += 1
        self.report.kinds[kind] += 1
        self.report.embedded += embedded
        self.report.copied += 2 - embedded
        self._since["kinds"][kind] = self._since["kinds"].get(kind, 0) + 1
        self._since["embedded"] += embedded

    def reject(self, row: Rejected) -> None:
        """List a row that is not imported."""
        self.report.rejected.append(row)
        self._since["rejected"].append([self.items - 1, asdict(row)])

    def take(self) -> dict[str, Any]:
        """Return what is noted with the shard that ends here."""
        told, self._since = self._since | {"items": self.items}, _nothing()
        return told

    def take_up(self, kept: Sequence[dict[str, Any]], items: Iterator[Candidate | Rejected]) -> None:
        """Be where the last of the ``kept`` notes was taken, and pass over the ``items`` up to there."""
        out: set[int] = set()
        for note in kept:
            for place, row in note["rejected"]:
                out.add(place)
                self.report.rejected.append(Rejected(**row))
            self.report.kinds.update(note["kinds"])
            rows = sum(note["kinds"].values())
            self.report.accepted += rows
            self.report.embedded += note["embedded"]
            self.report.copied += 2 * rows - note["embedded"]
            self.items = note["items"]
        for place, item in enumerate(islice(items, self.items)):
            if place not in out:
                self.used[item.id] += 1


def _nothing() -> dict[str, Any]:
    return {"rejected": [], "kinds": {}, "embedded": 0}


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
