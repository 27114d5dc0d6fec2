"""Stream the samples of a dataset: shuffled, decoded on the way, resumable to the exact row.

The order is a pure function of (seed, epoch) over the row index; a :class:`Cursor` is (epoch, position) and nothing
else. Ray Data carries row positions through decoding tasks (``from_items → map_batches → iter_batches``), so that only
a few blocks are ever decoded ahead. A row that cannot be decoded carries its reason in an error column, is quarantined,
and is replaced by the row that follows. Not responsible for what is in the shards (``schema``) or for decoding them
(``decoder``, ``video``).
"""

from __future__ import annotations

import copy
import logging
import math
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from actors.records import Sample, derive_seed
from cluster.errors import DataError
from pipeline.data.decoder import QuarantinedRow, Shard, VideoShape, block_items, decode_block
from pipeline.data.folder import open_dataset, survey
from pipeline.data.schema import open_shard
from pipeline.data.video import VideoLimits
from pipeline.support.location import Uri, parse_location

__all__ = [
    "Batch",
    "Cursor",
    "QuarantinedRow",
    "SampleSource",
    "VideoLimits",
    "VideoShape",
    "block_items",
    "load_all",
]

SEGMENT_ROWS = (
    1024  # rows of one Ray Data execution; starting one costs a second or two, and a millisecond for each task
)
# A Ray Data execution that waits for its consumer polls (``patience``). Where rows are small, an execution is therefore
# kept to what may lie decoded in memory, and runs to its end without waiting.
WHOLE_BYTES = 32 << 20
WHOLE_ROWS = 128  # fewer rows than this are not worth an execution of their own
BLOCK_BYTES = 8 << 20  # decoded bytes of one block, as a guide
TASK_BYTES = 64 << 20  # decoded bytes of one task, as a guide: starting one costs Ray Data ten milliseconds and more
TASK_ROWS = 16
BLOCKS_AHEAD = 4  # blocks that may wait, decoded, for the consumer
JUDGED_ROWS = 200  # rows that must be seen before a share of broken ones is believed, in larger datasets


@dataclass(frozen=True)
class Cursor:
    """The next row to read: ``position`` in the shuffled order of ``epoch``."""

    epoch: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the cursor as a checkpoint stores it."""
        return asdict(self)

    @classmethod
    def of(cls, value: Cursor | Mapping[str, int] | None) -> Cursor:
        """Return ``value``, or what a checkpoint stored, as a cursor; None is the beginning."""
        if value is None:
            return cls()
        return value if isinstance(value, Cursor) else cls(int(value["epoch"]), int(value["position"]))


class Batch(NamedTuple):
    """Samples, the rows that were passed over to find them, and the cursor of the row after the last one read."""

    samples: list[Sample]
    quarantined: list[QuarantinedRow]
    cursor: Cursor


class _Place(NamedTuple):
    """Where a row lies."""

    shard: int
    group: int
    offset: int  # within the group
    row: int  # within the shard


class SampleSource:
    """All samples of a folder of shards (path or URI), in an order that (seed, epoch) decides, for ever.

    ``decoders`` Ray tasks of ``cpus_per_decoder`` each decode at a time; Ray must be running. ``max_quarantine_ratio``: share of
    broken rows above which reading stops with a DataError.
    """

    def __init__(
        self,
        folder: str | Path | Uri,
        shape: VideoShape | None = None,
        *,
        seed: int = 0,
        decoders: int = 1,
        cpus_per_decoder: float = 0.5,
        max_quarantine_ratio: float = 0.05,
        limits: VideoLimits | None = None,
        shuffle: bool = True,
    ) -> None:
        location = parse_location(folder)
        self.folder = location.resolve() if isinstance(location, Path) else location
        self.shape = shape or VideoShape()
        self.seed, self.shuffle = seed, shuffle
        self.decoders, self.cpus_per_decoder = decoders, cpus_per_decoder
        self.max_quarantine_ratio = max_quarantine_ratio
        self.limits = limits or VideoLimits()
        found = open_dataset(self.folder)
        self.shards, self.digest = found.shards, found.digest
        self._places = _index(found.footers)
        self.count = len(self._places)
        if not self.count:
            raise DataError(f"dataset folder {self.folder} holds shards without rows")
        self._opened = tuple(Shard.of(path) for path in self.shards)
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._seen: set[int] = set()
        self._quarantine: dict[int, QuarantinedRow] = {}

    @property
    def quarantined(self) -> list[QuarantinedRow]:
        """The distinct rows found broken so far."""
        return list(self._quarantine.values())

    def order(self, epoch: int) -> np.ndarray:
        """Return the row numbers of ``epoch`` in reading order, int64 (count,)."""
        if epoch not in self._orders:
            if self.shuffle:
                generator = np.random.Generator(np.random.PCG64(derive_seed(self.seed, "order", epoch)))
                self._orders[epoch] = generator.permutation(self.count)
            else:
                self._orders[epoch] = np.arange(self.count)
            while len(self._orders) > 2:  # an epoch and the one that follows
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def ids(self) -> list[str]:
        """Return the id of every row in stored order; no video is read."""
        columns = []
        for shard in self.shards:
            with open_shard(shard) as file:
                columns.append(file.read(columns=["id"]).column("id").to_pylist())
        return [columns[place.shard][place.row] for place in self._places]

    def only(self, rows: Sequence[int]) -> SampleSource:
        """Return a source of the stored ``rows`` alone, in that order."""
        part = copy.copy(self)
        part._places = [self._places[row] for row in rows]
        part.count, part.shuffle = len(rows), False
        part._orders, part._seen, part._quarantine = OrderedDict(), set(), {}
        return part

    # --- reading ----------------------------------------------------------------------------------------------------

    def batches(self, size: int, cursor: Cursor | Mapping[str, int] | None = None) -> Generator[Batch, None, None]:
        """Yield batches of exactly ``size`` samples from ``cursor`` on, without end.

        Continuing from a batch's ``cursor`` gives the batches that would have followed it. Close the iterator to stop
        the decoders. Raises DataError when too many rows are broken.
        """
        if size < 1:
            raise DataError(f"size={size} must be at least 1")
        samples: list[Sample] = []
        quarantined: list[QuarantinedRow] = []
        with closing(self._rows(Cursor.of(cursor))) as rows:
            for after, item in rows:
                if isinstance(item, Sample):
                    samples.append(item)
                else:
                    quarantined.append(item)
                if len(samples) == size:
                    yield Batch(samples, quarantined, after)
                    samples, quarantined = [], []

    def load_all(self, limit: int | None = None) -> Batch:
        """Return the first ``limit`` usable samples (all by default) in the order of epoch 0; for evaluation sets.

        Raises DataError when there are fewer than ``limit``, or too many are broken.
        """
        wanted = self.count if limit is None else limit
        samples: list[Sample] = []
        quarantined: list[QuarantinedRow] = []
        after = Cursor()
        with closing(self._rows(after, epochs=1)) as rows:
            while len(samples) < wanted and (found := next(rows, None)) is not None:
                after, item = found
                if isinstance(item, Sample):
                    samples.append(item)
                else:
                    quarantined.append(item)
        if limit is not None and len(samples) < limit:
            broken = f", {len(quarantined)} of them broken" if quarantined else ""
            raise DataError(f"{self.folder} has {self.count} rows{broken}; {limit} samples were asked for")
        return Batch(samples, quarantined, after)

    def _rows(
        self, cursor: Cursor, epochs: int | None = None
    ) -> Generator[tuple[Cursor, Sample | QuarantinedRow], None, None]:
        """Yield each row as a sample or quarantined, with the cursor after it."""
        remaining = math.inf if epochs is None else epochs * self.count
        while remaining > 0:
            rows = int(min(self._segment_rows(), remaining))
            with closing(_blocks(self.dataset(cursor, rows))) as blocks:
                for block in blocks:
                    first = Cursor(int(block["epoch"][0]), int(block["position"][0]))
                    if first != cursor:
                        raise RuntimeError(f"Ray Data broke the order: {first} came where {cursor} was due")
                    for item in block_items(block, self.shape, self.shards):
                        row = int(self.order(cursor.epoch)[cursor.position])
                        self._note(row, item if isinstance(item, QuarantinedRow) else None)
                        cursor = self.advance(cursor, 1)
                        yield cursor, item
            remaining -= rows

    def _segment_rows(self) -> int:
        whole = WHOLE_BYTES // self.shape.row_bytes
        return min(whole, SEGMENT_ROWS) if whole >= WHOLE_ROWS else SEGMENT_ROWS

    def advance(self, cursor: Cursor, rows: int) -> Cursor:
        """Return ``cursor`` moved on by ``rows``."""
        epochs, position = divmod(cursor.position + rows, self.count)
        return Cursor(cursor.epoch + epochs, position)

    def dataset(self, cursor: Cursor | Mapping[str, int] | None = None, rows: int | None = None) -> Any:
        """Return a lazy ``ray.data.Dataset`` of ``rows`` decoded rows from ``cursor`` on (one epoch by default).

        For Ray Train; :func:`block_items` turns its numpy batches into samples.
        """
        cursor = Cursor.of(cursor)
        if cursor.position >= self.count:
            raise DataError(
                f"{self.folder} has {self.count} rows, and reading was to go on at row {cursor.position} of an epoch"
            )
        import ray
        import ray.data

        from pipeline.data.patience import Patience

        if not ray.is_initialized():
            raise RuntimeError("Ray is not running: call ray.init(...) before reading samples")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that bars are off, as set
        rows = self.count if rows is None else rows
        block = int(np.clip(BLOCK_BYTES // self.shape.row_bytes, 1, 16))
        task = max(block, int(np.clip(TASK_BYTES // self.shape.row_bytes, 1, TASK_ROWS)))
        dataset = ray.data.from_items(self._items(cursor, rows), override_num_blocks=max(1, math.ceil(rows / task)))
        context = dataset.context
        context.target_max_block_size = BLOCK_BYTES  # a task hands on what it has decoded before it has decoded all
        context.enable_progress_bars = False
        if Patience not in context.custom_execution_callback_classes:
            context.custom_execution_callback_classes.append(Patience)
        context.execution_options.preserve_order = True
        # Without a limit the decoders run hundreds of rows ahead, on cores that training needs.
        ahead = max(BLOCKS_AHEAD, 2 * self.decoders) * block * self.shape.row_bytes
        if rows <= self._segment_rows() and rows * self.shape.row_bytes <= WHOLE_BYTES:
            ahead = 2 * WHOLE_BYTES  # all of it, the blocks between operators included
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=ahead)
        # Tasks, not an actor pool: they hold no CPU while the consumer trains, and their processes outlive an execution.
        return dataset.map_batches(
            decode_block,
            fn_kwargs={
                "shards": self._unchanged(),
                "shape": self.shape,
                "limits": self.limits,
            },
            batch_size=block,
            batch_format="numpy",
            compute=ray.data.TaskPoolStrategy(size=self.decoders),
            num_cpus=self.cpus_per_decoder,
        )

    def _unchanged(self) -> tuple[Shard, ...]:
        """Return the shards as they are now; raises DataError where they hold other rows than when they were opened."""
        try:
            now = tuple(Shard.of(path) for path in self.shards)
        except FileNotFoundError as error:
            raise DataError(f"{self.folder}: a shard is gone since the folder was opened: {error}") from error
        if now != self._opened:
            if survey(self.folder).digest != self.digest:
                raise DataError(
                    f"{self.folder} holds other rows than when it was opened; a dataset must not change while it is read. Put the "
                    "shards back as they were and start again"
                )
            self._opened = now  # copied or touched, and no row is another one
        return now

    def _items(self, cursor: Cursor, rows: int) -> list[dict[str, int]]:
        items = []
        for _ in range(rows):
            place = self._places[self.order(cursor.epoch)[cursor.position]]
            items.append({"epoch": cursor.epoch, "position": cursor.position, **place._asdict()})
            cursor = self.advance(cursor, 1)
        return items

    # --- quarantine -------------------------------------------------------------------------------------------------

    def _note(self, row: int, broken: QuarantinedRow | None) -> None:
        """Count a row once; raises DataError when the share of broken ones is above the limit."""
        self._seen.add(row)
        if broken is None:
            return
        self._quarantine.setdefault(row, broken)
        judged = max(len(self._seen), min(self.count, JUDGED_ROWS))
        if len(self._quarantine) > self.max_quarantine_ratio * judged:
            first = list(self._quarantine.values())[:5]
            reasons = "\n".join(f"  {item.shard} row {item.row} ({item.id}): {item.reason}" for item in first)
            raise DataError(
                f"{len(self._quarantine)} of the {len(self._seen)} rows read from {self.folder} cannot be used; "
                f"the limit is data.max_quarantine_ratio={self.max_quarantine_ratio:g}. The first:\n{reasons}"
            )


def load_all(
    folder: str | Path | Uri, shape: VideoShape | None = None, limit: int | None = None, **options: Any
) -> Batch:
    """Return the first ``limit`` samples of ``folder`` in stored order (see :meth:`SampleSource.load_all`)."""
    return SampleSource(folder, shape, shuffle=False, **options).load_all(limit)


def _index(footers: list[pq.FileMetaData]) -> list[_Place]:
    places = []
    for shard, footer in enumerate(footers):
        row = 0
        for group in range(footer.num_row_groups):
            for offset in range(footer.row_group(group).num_rows):
                places.append(_Place(shard, group, offset, row))
                row += 1
    return places


def _blocks(dataset: Any) -> Generator[dict[str, np.ndarray], None, None]:
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
