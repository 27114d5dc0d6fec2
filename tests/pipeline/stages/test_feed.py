"""The feed draws every sample once, in order, whatever sizes are asked for, and resumes at the exact next one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from actors.records import Sample
from pipeline.data.source import Batch, Cursor
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
