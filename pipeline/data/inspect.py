"""Look at a dataset: counts, sizes, caption lengths, what its build lost, and a contact sheet. Reads Parquet alone, without Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from rich.table import Table

from cluster.errors import DataError
from cluster.harmless import in_markup, printable
from pipeline.data.build.funnel import Funnel, draw_funnel, read_funnel
from pipeline.data.folder import survey
from pipeline.data.schema import open_shard, shard_bytes
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.video import decode_video, probe
from pipeline.support import terminal
from pipeline.support.location import Uri, parse_location
from rewards.format import DEFAULT

TEXT = ["kind", "question", "caption", "meta", "answer"]
SHARES = {"language": "language", "recipe type": "topic"}  # what the table calls it → its key in a row's ``meta``
SHEET_FRAMES = 6
SHEET_HEIGHT = 96  # pixels of a frame on the sheet, unless it is smaller itself


@dataclass
class DatasetReport:
    """What a dataset holds. Sizes are of a few rows spread over the set, lengths of all of them."""

    folder: Path | Uri
    shards: int
    rows: int
    file_bytes: int
    video_bytes: int
    digest: str
    kinds: Counter[str] = field(default_factory=Counter)
    questions: int = 0  # different ones
    captions: int = 0  # different ones
    caption_words: tuple[int, float, int] = (0, 0.0, 0)  # shortest, mean, longest
    sizes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (id, reason), among the rows looked at
    whole: str = ""  # whether all of the dataset is there
    problems: list[str] = field(default_factory=list)  # why training would refuse it
    looked_at: int = 0
    sheet: Path | None = None
    shares: dict[str, Counter[str]] = field(
        default_factory=dict
    )  # rows by language and recipe type, as far as rows state them
    reasonings: int = 0  # rows that have one
    funnel: Funnel | None = None  # of the build that made it
    funnel_picture: Path | None = None


def inspect(folder: str | Path | Uri, sheet: str | Path | None = None, *, rows: int = 8) -> DatasetReport:
    """Read the dataset in ``folder`` and write a contact sheet of ``rows`` rows spread evenly over it.

    ``sheet``: the PNG, by default ``_contact_sheet.png`` beside the shards; of a URI ``<folder>_contact_sheet.png`` in the
    working directory. Of a set that ``vans data build`` made, a picture of what that lost is written beside it. What training would
    refuse stands in the report's ``problems``. Raises DataError where there are no shards, StorageError.
    """
    folder = parse_location(folder)
    if sheet is None:
        sheet = folder / "_contact_sheet.png" if isinstance(folder, Path) else Path(f"{folder.name}_contact_sheet.png")
    found = survey(folder)
    shards, footers, total = found.shards, found.footers, found.rows
    content = " ".join(digest[:16] for digest in found.digests[:4])
    report = DatasetReport(folder, len(shards), total, sum(map(shard_bytes, shards)), 0, content)
    report.whole, report.problems = found.completeness, found.problems
    if not total:
        raise DataError(f"dataset folder {folder} holds shards without rows")
    report.shares = {name: Counter() for name in SHARES}
    questions: set[str] = set()
    captions: Counter[str] = Counter()
    for path in shards:
        with open_shard(path) as file:
            for batch in file.iter_batches(64, columns=[*TEXT, "input_video", "target_video"]):
                report.kinds.update(batch["kind"].to_pylist())
                questions.update(batch["question"].to_pylist())
                captions.update(batch["caption"].to_pylist())
                for meta, answer in zip(batch["meta"].to_pylist(), batch["answer"].to_pylist()):
                    _count(report, meta, answer)
                for name in ("input_video", "target_video"):
                    report.video_bytes += pc.sum(pc.binary_length(batch[name])).as_py() or 0
    lengths = np.repeat([len(text.split()) for text in captions], list(captions.values()))
    report.questions, report.captions = len(questions), len(captions)
    report.caption_words = (int(lengths.min()), float(lengths.mean()), int(lengths.max()))
    _look(report, shards, [footer.num_rows for footer in footers], rows, Path(sheet))
    report.funnel = read_funnel(folder)
    if report.funnel is not None:
        picture = Path(sheet).with_name(Path(sheet).name.replace("contact_sheet", "funnel"))
        if picture == Path(sheet):
            picture = picture.with_name(f"{picture.stem}_funnel.png")
        report.funnel_picture = draw_funnel(report.funnel, picture, title=f"where the build of {folder.name} lost what")
    return report


def _count(report: DatasetReport, meta: str, answer: str | None) -> None:
    """Count what one row states of itself."""
    try:
        stated = json.loads(meta)
    except ValueError:  # a shard of another writer
        stated = None
    for name, key in SHARES.items():
        value = stated.get(key) if isinstance(stated, dict) else None
        if isinstance(value, str | int) and value != "":
            report.shares[name][str(value)] += 1
    report.reasonings += bool(_reasoning(answer))


def _reasoning(answer: str | None) -> str:
    """Return the thought of ``answer``; all of it where it has other tags than the default."""
    if not answer:
        return ""
    parsed = DEFAULT.parse(answer)
    return answer if parsed is None else parsed.thought


def _look(report: DatasetReport, shards: Sequence[Path | Uri], counts: list[int], rows: int, sheet: Path) -> None:
    """Decode ``rows`` rows spread over the dataset, note their sizes, and draw them."""
    cards = []
    for number in np.unique(np.linspace(0, sum(counts) - 1, max(1, rows)).astype(int)):
        row = _row(shards, counts, int(number))
        report.looked_at += 1
        try:
            strips = []
            thought = _reasoning(row["answer"])
            reasoning = f"reasoning: {thought}" if thought else ""
            for part, label, note in (
                ("input_video", "input", reasoning),
                ("target_video", f"next event\n{row['caption']}", ""),
            ):
                info = probe(row[part])
                report.sizes[f"{info.width}x{info.height}, {info.fps:.3g} fps, {info.codec}"] += 1
                report.seconds.append(info.seconds)
                height = min(SHEET_HEIGHT, info.height)
                width = max(1, round(height * info.width / info.height))
                frames = decode_video(row[part], SHEET_FRAMES, height, width)
                strips.append(Strip(label, frames, f"{info.seconds:.1f} s" + (f"\n{note}" if note else "")))
            cards.append((f"{row['id']} ({row['kind']}): {row['question']}", strips))
        except DataError as error:
            report.broken.append((row["id"], str(error)))
    if cards:
        report.sheet = contact_sheet(cards, sheet, title=report.folder.name)


def _row(shards: Sequence[Path | Uri], counts: list[int], number: int) -> dict:
    for path, count in zip(shards, counts):
        if number >= count:
            number -= count
            continue
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number < size:
                    return file.read_row_group(group).slice(number, 1).to_pylist()[0]
                number -= size
    raise IndexError(number)


def _shown(shares: Counter[str], rows: int, most: int = 6) -> str:
    """Return the largest shares of ``rows`` for people."""
    shown = [f"{value} {count / rows:.0%}" for value, count in shares.most_common(most)]
    more = len(shares) - len(shown)
    unknown = rows - sum(shares.values())
    return ", ".join(shown + [f"{more} others"] * bool(more) + [f"not stated {unknown / rows:.0%}"] * bool(unknown))


def _lost(report: DatasetReport) -> dict[str, str]:
    """Return the table's lines about the build that made the set."""
    if report.funnel is None:
        return {}
    made, kept = report.funnel.made, report.funnel.kept
    counts = ", ".join(f"{kept.get(what, 0)} of {made[what]} {what}s" for what in made if made[what])
    return {"kept of the build": counts, "funnel": str(report.funnel_picture)}


def print_report(report: DatasetReport) -> None:
    """Print ``report`` as a table."""
    low, mean, high = report.caption_words
    lines = {
        "rows": f"{report.rows} in {report.shards} shards",
        "whole": report.whole,
        "kinds": ", ".join(
            f"{count} {kind} ({count / report.rows:.0%})" for kind, count in sorted(report.kinds.items())
        ),
        **{name: _shown(shares, report.rows) for name, shares in report.shares.items() if shares},
        "on disk": f"{report.file_bytes / 2**20:.2f} MiB, {report.video_bytes / 2 / report.rows / 1024:.1f} KiB a clip",
        "questions": f"{report.questions} different",
        "captions": f"{report.captions} different, {low} to {high} words, {mean:.1f} on average",
        "reasoning": f"in {report.reasonings} rows",
        "clips": "; ".join(f"{count} of {size}" for size, count in report.sizes.most_common(4))
        + f" (of {report.looked_at} rows looked at)",
        "seconds": f"{min(report.seconds):.2f} to {max(report.seconds):.2f}" if report.seconds else "-",
        "content": report.digest,
        "broken": "; ".join(f"{name}: {reason}" for name, reason in report.broken) or "none of those looked at",
        **_lost(report),
        "sheet": str(report.sheet or "none: no row could be decoded"),
    }
    table = Table(title=in_markup(str(report.folder)), show_header=False, title_justify="left")
    for name, value in lines.items():
        table.add_row(name, printable(value))
    console = terminal.console()
    console.print(table, markup=False)
    for problem in report.problems:
        console.print(
            f"not usable: {printable(problem)}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
