"""``vans data select``: ask the pair about every row of a dataset, and write the rows from which Joint-GRPO can learn.

Each row's group is sampled, rendered and scored as stage 1 does, and the thinker is asked for stage 2's anchor; nothing is
trained. What is found is written down row by row, so that a selection that was interrupted goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import DataError
from pipeline.config import RunConfig
from pipeline.data.schema import SCHEMA, Row, ShardWriter, open_shard
from pipeline.data.source import Cursor, SampleSource
from pipeline.data.sources import run_inputs, training_source
from pipeline.evaluate.selection import BROKEN, KEPT, REASONS, Verdict, as_csv, choose, counts, judge
from pipeline.fleet.models import require_drawable
from pipeline.fleet.open import Fleet, cluster_session, open_fleet, pool_sections
from pipeline.lock import hold
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.stages.groups import FailureBudget, Group
from pipeline.stages.stage1 import Stage1
from pipeline.stages.stage2 import Stage2
from pipeline.support import terminal
from pipeline.support.location import write_bytes
from pipeline.support.progress import bar

JUDGED, TABLE = "_judged.jsonl", "_selection.csv"  # beside the shards; readers of them pass over an underscore
KEY = "select"
"""Stands for the step in the seeds: a row is sampled with the same ones however often it is asked."""


def run_selection(config: RunConfig, count: int, out: Path) -> list[Verdict]:
    """Write the ``count`` rows of ``data.train`` with the largest spread of rewards, whose anchors pass, into ``out``.

    Called again it goes on where it was. Raises DataError where no row teaches anything, or ``out`` holds another selection;
    TrainingError where too many requests fail (rollout.max_failed_ratio).
    """
    console = terminal.console()
    require_drawable(config)
    with hold(out, "vans data select", name=f"--out {out}"), cluster_session(config):
        terminal.keep_log_in(out)
        source = training_source(config)
        source = source.only(range(source.count))  # in stored order
        journal = JudgedRows(out / JUDGED, _facts(config, source))
        asyncio.run(_judge_all(config, source, journal, console))
        verdicts = choose(journal.verdicts, count)
        _report(console, verdicts, count, out)
        write_bytes(out / TABLE, as_csv(verdicts).encode("utf-8", "backslashreplace"))
        if not any(verdict.why == KEPT for verdict in verdicts):
            raise DataError(f"no row of {source.folder} teaches anything: {out / TABLE} says why of each")
        _write(
            source, verdicts, out, {"command": "vans data select", "of": source.digest, "count": count} | journal.facts
        )
    return verdicts


class JudgedRows:
    """The verdicts so far, a line of JSON each, below a line that says what they follow from."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.verdicts: list[Verdict] = []
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(facts)
            return
        whole, torn = path.read_bytes().rpartition(b"\n")[::2]
        if torn:  # what a kill cut short
            os.truncate(path, len(whole) + 1)
        head, *lines = whole.splitlines() or [b"{}"]
        if json.loads(head) != facts:
            raise DataError(
                f"{path} is of a selection from other rows, models or settings; give another --out, or remove that file"
            )
        self.verdicts = [Verdict.of(json.loads(line)) for line in lines]

    def add(self, verdict: Verdict) -> None:
        """Write ``verdict`` down."""
        self._append(verdict.to_json())
        self.verdicts.append(verdict)

    def _append(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _facts(config: RunConfig, source: SampleSource) -> dict[str, Any]:
    """Return what the verdicts follow from: rows, models, and the settings by which groups are sampled and judged."""
    settings = config.model_dump(mode="json", include={"seed", "stage1", "stage2", "models", "video"})
    told = json.dumps(settings, sort_keys=True).encode()
    inputs = run_inputs(config, source)
    return {"rows": source.digest, "models": inputs.models, "settings": hashlib.sha256(told).hexdigest()}


async def _judge_all(config: RunConfig, source: SampleSource, journal: JudgedRows, console: Console) -> None:
    done = len(journal.verdicts)
    if done == source.count:
        return
    if done:
        console.print(f"{done} of {source.count} rows are judged already; it goes on after them", highlight=False)
    async with open_fleet(config, only=tuple(pool_sections(config))) as fleet:
        with bar(console, "judging rows", source.count - done) as progress:
            async for verdict in verdicts_of(config, fleet, source, done):
                journal.add(verdict)
                progress.advance()


async def verdicts_of(config: RunConfig, fleet: Fleet, source: SampleSource, first: int) -> AsyncIterator[Verdict]:
    """Yield the verdict of each row of ``source`` from ``first`` on, in order; two steps' groups are in flight at a time."""
    one, two = Stage1(config, fleet), Stage2(config, fleet)
    budget = FailureBudget("vans data select", config.stage1.rollout.max_failed_ratio)
    ahead = 2 * config.stage1.rollout.prompts_per_step
    waiting: deque[asyncio.Task[tuple[Verdict, Group | None]]] = deque()
    section = config.stage1

    async def judged(row: int, sample: Any) -> tuple[Verdict, Group | None]:
        group, anchor = await asyncio.gather(one.group(sample, KEY), two.anchor(sample, KEY))
        found = group or Group(sample, ())
        learning = section.learning
        verdict = judge(
            row,
            found,
            anchor,
            section.rewards.weights,
            normalise=learning.normalise_rewards,
            min_group=learning.min_group,
            min_rouge=config.stage2.anchor_min_rouge,
        )
        return verdict, group

    async def known(verdict: Verdict) -> tuple[Verdict, Group | None]:
        return verdict, None

    with closing(SampleFeed(source, 1, FeedCursor(Cursor(position=first)))) as feed:
        try:
            row = first
            while row < source.count or waiting:
                if row < source.count and len(waiting) < ahead:
                    broken = len(feed.quarantined)
                    (sample,) = await feed.draw(1)
                    after = feed.cursor.source
                    end = source.count if after.epoch else after.position  # one behind the sample
                    # Where the last rows are broken the feed begins anew, with rows that are judged already.
                    for item in feed.quarantined[broken:][: source.count - row]:
                        waiting.append(asyncio.create_task(known(Verdict(row, item.id, BROKEN, item.reason))))
                        row += 1
                    if row < end:
                        waiting.append(asyncio.create_task(judged(row, sample)))
                        row = end
                    continue
                verdict, group = await waiting.popleft()
                budget.count([group])
                yield verdict
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


def _write(source: SampleSource, verdicts: Sequence[Verdict], out: Path, plan: dict[str, Any]) -> None:
    """Write the kept rows in stored order, with what they were kept for in ``meta``."""
    if ShardWriter.wrote(out, plan):
        return
    kept = {verdict.row: verdict for verdict in verdicts if verdict.why == KEPT}
    with ShardWriter(out, plan=plan) as writer:
        passed = writer.count
        for number, values in _stored(source, sorted(kept)):
            if passed:
                passed -= 1
                continue
            meta = json.loads(values["meta"]) | {"rl": {"reward": kept[number].reward, "spread": kept[number].spread}}
            writer.write(Row(**values | {"meta": json.dumps(meta, ensure_ascii=False)}))


def _stored(source: SampleSource, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the stored values of ``rows`` (ascending), one row group in memory at a time."""
    wanted, number = set(rows), 0
    for path in source.shards:
        with open_shard(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                inside = sorted(wanted.intersection(range(number, number + size)))
                if inside:
                    names = [name for name in SCHEMA.names if name in file.schema_arrow.names]
                    table = file.read_row_group(group, columns=names).take([row - number for row in inside])
                    yield from zip(inside, table.to_pylist(), strict=True)
                number += size


def _report(console: Console, verdicts: Sequence[Verdict], count: int, out: Path) -> None:
    table = Table(title=f"{len(verdicts)} rows, {count} wanted", title_justify="left")
    for name in ("rows", "why", "meaning"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for why, number in counts(verdicts).items():
        table.add_row(str(number), why, REASONS[why])
    console.print(table, markup=False)
    console.print(f"each row's figures: {out / TABLE}", highlight=False, markup=False, soft_wrap=True)
