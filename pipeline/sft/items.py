"""Decoded samples on a rank: read from Ray Data, kept in memory where they fit, and dealt out in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from actors.records import Sample, derive_seed
from actors.vdm.conditioning import select_reference_frames
from cluster.errors import DataError
from pipeline.data.decoder import QuarantinedRow, block_items
from pipeline.location import parse_location
from pipeline.sft.settings import SftSettings


def answer_text(sample: Sample) -> str:
    """Return the text that the VLM learns to write; where the dataset has none, its caption is thought and answer."""
    if sample.answer:
        return sample.answer
    return f"<think> {sample.caption} </think> <ans> {sample.caption} </ans>"


def training_item(kind: str, sample: Sample, reference_frames: int) -> tuple[Any, ...]:
    """Return what the policy's ``sft_loss`` takes of one sample."""
    if kind == "vlm":
        return sample.asked, answer_text(sample)
    return select_reference_frames(sample.context, reference_frames), sample.caption, sample.target_frames


class Items:
    """An endless, seeded stream of a rank's batches over its shard of the dataset."""

    def __init__(
        self, dataset: Any, kind: str, settings: SftSettings, shards: list[str], rank: int, samples: int
    ) -> None:
        """``dataset`` is Ray Train's iterator over this rank's shard; ``samples`` is the size of the whole dataset."""
        self.dataset, self.kind, self.settings, self.rank = dataset, kind, settings, rank
        self.shards = [parse_location(path) for path in shards]
        self.quarantined: set[tuple[str, int]] = set()
        self.size = settings.batch // settings.ranks
        self.cached = samples * settings.shape.row_bytes / settings.ranks <= settings.cache_mib * 2**20

    def batches(self, start: int) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the batches from optimizer step ``start`` on.

        In memory each pass is a new permutation of (seed, rank, pass), so step ``start`` has the batch it would have
        had without a restart. A streamed set begins a new pass instead.
        """
        return self._from_memory(start) if self.cached else self._streamed()

    def _read(self) -> Iterator[tuple[Any, ...]]:
        found = 0
        for block in self.dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            for item in block_items(block, self.settings.shape, self.shards):
                if isinstance(item, QuarantinedRow):
                    self.quarantined.add((item.shard, item.row))
                    continue
                found += 1
                yield training_item(self.kind, item, self.settings.reference_frames)
            broken = len(self.quarantined)
            if broken > max(self.settings.max_quarantine_ratio * (found + broken), 1) and found + broken >= 20:
                raise DataError(
                    f"{broken} of {found + broken} rows cannot be used, more than "
                    f"max_quarantine_ratio={self.settings.max_quarantine_ratio:g}; `vans data inspect` lists why"
                )
        if not found:
            raise DataError(f"rank {self.rank} got no usable sample; use fewer ranks or more data")

    def _from_memory(self, start: int) -> Iterator[list[tuple[Any, ...]]]:
        items = list(self._read())
        count, epoch, order = len(items), -1, np.arange(0)
        position = start * self.size
        while True:
            batch = []
            for _ in range(self.size):
                if position // count != epoch:
                    epoch = position // count
                    seed = derive_seed("sft", self.settings.seed, self.rank, epoch)
                    order = np.random.default_rng(seed).permutation(count)
                batch.append(items[order[position % count]])
                position += 1
            yield batch

    def _streamed(self) -> Iterator[list[tuple[Any, ...]]]:
        batch: list[tuple[Any, ...]] = []
        while True:
            for item in self._read():
                batch.append(item)
                if len(batch) == self.size:
                    yield batch
                    batch = []
