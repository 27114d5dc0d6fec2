"""The feed draws every sample once, in order, whatever sizes are asked for, and resumes at the exact next one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.records import Sample, derive_seed
from pipeline.data.source import Batch, Cursor, QuarantinedRow
from pipeline.stages.feed import FeedCursor, SampleFeed

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)
COUNT = 10


class Numbers:
    """An endless source of samples 0 … 9, epoch after epoch, with the interface of ``SampleSource``."""

    def batches(self, size: int, cursor: Cursor | None = None) -> Iterator[Batch]:
        at = cursor or Cursor()
        while True:
            samples = []
            for _ in range(size):
                samples.append(Sample(f"{at.epoch}.{at.position}", "predictive", "q", "c", FRAMES, FRAMES))
                at = Cursor(at.epoch, at.position + 1) if at.position + 1 < COUNT else Cursor(at.epoch + 1, 0)
            yield Batch(samples, [], at)


def ids(feed: SampleFeed, *counts: int) -> list[str]:
    async def draw() -> list[str]:
        return [s.id for count in counts for s in await feed.draw(count)]

    return asyncio.run(draw())


def test_draws_of_any_size_give_the_source_order() -> None:
    feed = SampleFeed(Numbers(), 4)
    assert ids(feed, 1, 3, 5, 2, 4) == [f"0.{i}" for i in range(10)] + [f"1.{i}" for i in range(5)]


@pytest.mark.parametrize("first", range(13))
def test_resumes_at_the_exact_next_sample(first: int) -> None:
    whole = ids(SampleFeed(Numbers(), 4), first + 7)
    feed = SampleFeed(Numbers(), 4)
    ids(feed, first)
    cursor = FeedCursor.from_json(feed.cursor.to_json())
    assert ids(SampleFeed(Numbers(), 4, cursor), 7) == whole[first:]


@dataclass
class Rows:
    """``count`` rows in an order of (seed, epoch), the ``broken`` ones quarantined, as ``SampleSource`` deals them out."""

    count: int
    broken: frozenset[int] = frozenset()

    def batches(self, size: int, cursor: Cursor | None = None) -> Iterator[Batch]:
        at, samples, bad = cursor or Cursor(), [], []
        while True:
            order = np.random.default_rng(derive_seed("order", at.epoch)).permutation(self.count)
            row, here = int(order[at.position]), at
            at = Cursor(at.epoch, at.position + 1) if at.position + 1 < self.count else Cursor(at.epoch + 1, 0)
            if row in self.broken:
                bad.append(QuarantinedRow(here.epoch, here.position, "part", row, f"r{row}", "broken"))
                continue
            samples.append(Sample(f"{here.epoch}.r{row}", "predictive", "q", "c", FRAMES, FRAMES))
            if len(samples) == size:
                yield Batch(samples, bad, at)
                samples, bad = [], []


def written_and_read(feed: SampleFeed, source: Rows, size: int) -> SampleFeed:
    """A feed as a resumed run makes it, of the cursor that a checkpoint holds; ``size`` rows are asked for at a time."""
    feed.close()
    return SampleFeed(source, size, FeedCursor.from_json(feed.cursor.to_json()))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(3, 12),
    broken=st.frozensets(st.integers(0, 11), max_size=2),
    parts=st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 7), max_size=4)), min_size=2, max_size=5),
)
def test_draw_resume_draw_resume_is_one_undisturbed_run(
    count: int, broken: frozenset[int], parts: list[tuple[int, list[int]]]
) -> None:
    """Each part is a process: the size of its batches, and what it draws (steps and refills alike) before it is resumed."""
    source = Rows(count, broken)
    drawn, feed = [], SampleFeed(source, parts[0][0])  # type: ignore[arg-type]
    for size, draws in parts:
        feed = written_and_read(feed, source, size)
        drawn += ids(feed, *draws)
    whole = SampleFeed(source, 3)  # type: ignore[arg-type]
    assert drawn == ids(whole, len(drawn))
    feed = written_and_read(feed, source, 1)
    assert ids(feed, 1) == ids(whole, 1)


@pytest.mark.parametrize("size", [1, 4])
def test_a_resume_between_two_refills_skips_what_was_drawn_and_nothing_else(size: int) -> None:
    source, whole = Rows(9, frozenset({2})), ids(SampleFeed(Rows(9, frozenset({2})), 4), 9)  # type: ignore[arg-type]
    feed = SampleFeed(source, 4)  # type: ignore[arg-type]
    assert ids(feed, 2) == whole[:2]
    for first in (2, 3, 4, 6, 7):
        feed = written_and_read(feed, source, size)
        last = {2: 3, 3: 4, 4: 6, 6: 7, 7: 9}[first]
        assert ids(feed, last - first) == whole[first:last]


def test_rows_that_become_usable_do_not_move_the_place_to_go_on() -> None:
    """A limit that is raised for the resume changes which rows a batch holds, not which row is next."""
    feed = SampleFeed(Rows(10, frozenset({0, 1, 2, 3})), 1)  # type: ignore[arg-type]
    before = ids(feed, 5)
    at = feed.cursor.source
    feed = written_and_read(feed, Rows(10), 1)
    order = [f"0.r{row}" for row in np.random.default_rng(derive_seed("order", 0)).permutation(10)]
    assert ids(feed, 10 - at.position) == order[at.position :] and before[-1] == order[at.position - 1]


def test_a_row_that_is_quarantined_is_counted_once_and_a_restart_forgets_none() -> None:
    feed = SampleFeed(Rows(6, frozenset({1, 4})), 2)  # type: ignore[arg-type]
    ids(feed, 7)  # into the second epoch
    assert sorted(item.row for item in feed.quarantined) == [1, 4]
    again = feed.at(FeedCursor(Cursor()))
    feed.close()
    assert [item.row for item in again.quarantined] == [item.row for item in feed.quarantined]
    ids(again, 9)
    assert len(again.quarantined) == 2


class Held(Numbers):
    """A source whose second batch arrives when ``go`` is set; ``closed`` once its iterator has been closed."""

    def __init__(self) -> None:
        self.go, self.closed = threading.Event(), False

    def batches(self, size: int, cursor: Cursor | None = None) -> Iterator[Batch]:
        found = super().batches(size, cursor)
        try:
            yield next(found)
            assert self.go.wait(30)
            yield from found
        finally:
            self.closed = True


def test_the_event_loop_runs_on_while_a_batch_is_decoded_and_a_cancelled_draw_lets_the_feed_close() -> None:
    async def main() -> tuple[int, bool]:
        source = Held()
        feed = SampleFeed(source, 1)
        await feed.draw(1)
        waiting = asyncio.create_task(feed.draw(1))
        turns = 0
        for _ in range(20):  # the draw waits for the source, and the loop turns all the same
            await asyncio.sleep(0.001)
            turns += 1
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        closing = asyncio.create_task(asyncio.to_thread(feed.close))
        await asyncio.sleep(0.01)
        assert not source.closed, "the thread is still inside next"
        source.go.set()
        await asyncio.wait_for(closing, 30)
        return turns, source.closed

    assert asyncio.run(main()) == (20, True)
