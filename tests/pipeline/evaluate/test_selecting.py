"""Every row of a dataset gets its verdict, in order, once: broken rows too, at the end too, and after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cluster.errors import TrainingError
from pipeline.data.decoder import QuarantinedRow
from pipeline.data.source import Batch, Cursor
from pipeline.evaluate.selecting import verdicts_of
from pipeline.evaluate.selection import ANCHOR, BROKEN, Verdict
from tests.benchmarks.simulated import cluster, sample


@dataclass
class Rows:
    """``count`` rows in stored order, for ever; those in ``broken`` cannot be decoded, those in ``wordless`` have no caption."""

    count: int
    broken: frozenset[int] = frozenset()
    wordless: frozenset[int] = frozenset()

    def batches(self, size: int, cursor: Cursor) -> Iterator[Batch]:
        assert size == 1
        passed: list[QuarantinedRow] = []
        while True:
            row, after = cursor.position, cursor.position + 1
            cursor = Cursor(cursor.epoch + after // self.count, after % self.count)
            if row in self.broken:
                passed.append(QuarantinedRow(cursor.epoch, row, "part-0", row, f"s{row}", "no frames"))
                continue
            made = sample(row)
            yield Batch([replace(made, caption="!" if row in self.wordless else made.caption)], passed, cursor)
            passed = []


def judged(rows: Rows, first: int = 0, **stage: Any) -> list[Verdict]:
    async def all_of() -> list[Verdict]:
        made = cluster(lambda pool, requests: 0.0, (1, 1, 1), group_size=3, **{"rollout.prompts_per_step": 2})
        async with made as fleet:
            config = fleet.config.model_copy(update=stage)
            return [verdict async for verdict in verdicts_of(config, fleet.fleet, rows, first)]  # type: ignore[arg-type]

    return asyncio.run(all_of())


@pytest.mark.parametrize("broken", [(), (0,), (2, 3), (6,), (5, 6), (0, 1, 6)])
@pytest.mark.parametrize("first", [0, 3])
def test_rows_come_in_order_and_each_once(broken: tuple[int, ...], first: int) -> None:
    found = judged(Rows(7, frozenset(broken)), first)
    assert [verdict.row for verdict in found] == list(range(first, 7))
    assert [verdict.id for verdict in found] == [f"s{row}" for row in range(first, 7)]
    assert [verdict.row for verdict in found if verdict.why == BROKEN] == [row for row in broken if row >= first]
    assert all(verdict.told == "no frames" for verdict in found if verdict.why == BROKEN)
    asked = [verdict for verdict in found if verdict.why != BROKEN]
    # The sleeping thinker's captions name the sample, and have no word of the truth.
    assert {verdict.why for verdict in asked} == {ANCHOR} and {verdict.scored for verdict in asked} == {3}


def test_a_row_is_judged_alike_wherever_one_begins() -> None:
    assert judged(Rows(5))[2:] == judged(Rows(5), 2)


def test_a_caption_that_nothing_can_be_compared_with_costs_its_row_alone() -> None:
    found = judged(Rows(6, wordless=frozenset({4})))
    assert [verdict.why for verdict in found] == [ANCHOR] * 6
    assert "cannot be compared" in found[4].told


def test_too_many_lost_requests_stop_it() -> None:
    class Refusing:
        name = "vlm"

        async def submit(self, request: Any) -> Any:
            from actors.pool.errors import SampleFailed

            raise SampleFailed("too long for the model")

    async def run() -> None:
        made = cluster(lambda pool, requests: 0.0, (1, 1, 1), group_size=3, **{"rollout.prompts_per_step": 2})
        async with made as fleet:
            silent = replace(fleet.fleet, named={**fleet.fleet.named, "vlm": Refusing()})
            async for _ in verdicts_of(fleet.config, silent, Rows(60), 0):  # type: ignore[arg-type]
                pass

    with pytest.raises(TrainingError, match=r"too long for the model"):
        asyncio.run(run())
