"""Samples one after another from the streaming source, with a cursor that resumes at the exact next sample.

The source (Ray Data) is a blocking iterator; it is advanced in a thread so that the driver's event loop never waits for decoding.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

from actors.records import Sample
from cluster.errors import CheckpointError
from pipeline.data.source import Batch, Cursor, QuarantinedRow, SampleSource


@dataclass(frozen=True)
class FeedCursor:
    """Where to go on: the source's cursor of the current batch, and how many of its samples were already drawn."""

    source: Cursor
    drawn: int = 0

    def to_json(self) -> dict[str, int]:
        """Return the cursor as plain numbers for the checkpoint."""
        return {"epoch": self.source.epoch, "position": self.source.position, "drawn": self.drawn}

    @classmethod
    def from_json(cls, values: dict[str, int]) -> FeedCursor:
        """Return the cursor that :meth:`to_json` wrote; raises CheckpointError where a number is missing."""
        if missing := {"epoch", "position", "drawn"} - set(values):
            raise CheckpointError(f"the checkpoint's data cursor lacks {', '.join(sorted(missing))}")
        return cls(Cursor(epoch=values["epoch"], position=values["position"]), values["drawn"])


@dataclass
class SampleFeed:
    """Draw samples in the source's order. Not safe for concurrent draws: the stage loop holds a lock around them.

    ``batch_size``: samples that are asked of the source at a time. With 1 the cursor names a row and nothing else, so it holds
    for a run that is resumed with other limits of what is usable. ``quarantined`` has each row once, however often it comes by.
    """

    source: SampleSource
    batch_size: int
    cursor: FeedCursor = field(default_factory=lambda: FeedCursor(Cursor(epoch=0, position=0)))
    quarantined: list[QuarantinedRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._batches = self.source.batches(self.batch_size, self.cursor.source)
        self._buffer: list[Sample] = []
        self._after = self.cursor.source
        self._skip = self.cursor.drawn
        self._lock = (
            threading.Lock()
        )  # a cancelled wait leaves its thread inside ``next``, where closing must not interfere

    async def draw(self, count: int) -> list[Sample]:
        """Return the next ``count`` samples."""
        drawn: list[Sample] = []
        while len(drawn) < count:
            while not self._buffer:
                await self._refill()
            take = min(count - len(drawn), len(self._buffer))
            drawn += self._buffer[:take]
            del self._buffer[:take]
            self.cursor = (
                FeedCursor(self.cursor.source, self.cursor.drawn + take) if self._buffer else FeedCursor(self._after)
            )
        return drawn

    def at(self, cursor: FeedCursor) -> SampleFeed:
        """Return a feed of the same source that goes on at ``cursor``; close this one."""
        return SampleFeed(self.source, self.batch_size, cursor, list(self.quarantined))

    def close(self) -> None:
        """Stop the decoders, when the batch that is being decoded is done. The feed cannot be drawn from afterwards."""
        with self._lock:
            self._batches.close()

    def _next(self) -> Batch:
        with self._lock:
            return next(self._batches)

    async def _refill(self) -> None:
        start = self._after
        samples, bad, self._after = await asyncio.to_thread(self._next)
        known = {(item.shard, item.row) for item in self.quarantined}
        self.quarantined += [item for item in bad if (item.shard, item.row) not in known]
        skip = min(self._skip, len(samples))  # a checkpoint's batches may have been larger than these
        self._skip -= skip
        self._buffer = list(samples[skip:])
        self.cursor = FeedCursor(start, skip) if self._buffer else FeedCursor(self._after, self._skip)
