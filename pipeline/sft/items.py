"""Decoded samples on a rank: read from Ray Data, kept in memory where they fit, and dealt out in batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from actors.failures import BadSampleError
from actors.records import Sample, derive_seed
from actors.vdm.frames import conditioning_frames
from cluster.errors import DataError
from pipeline.data.decoder import QuarantinedRow, block_items
from pipeline.sft.settings import SftSettings
from pipeline.support.location import parse_location
from rewards.format import DEFAULT, AnswerFormat

log = logging.getLogger(__name__)


def answer_text(sample: Sample, answers: AnswerFormat = DEFAULT) -> str:
    """Return the text that the VLM learns to write, in the run's format; where the dataset has none, its caption is thought and
    answer.

    Datasets hold answers in the default format, which is written anew for a run of another; a text of neither stays as it is.
    """
    if not sample.answer:
        return answers.write(sample.caption, sample.caption)
    held = None if answers.tags == DEFAULT.tags else DEFAULT.parse(sample.answer)
    return sample.answer if held is None else answers.write(held.thought, held.caption)


def training_item(kind: str, sample: Sample, settings: SftSettings) -> tuple[Any, ...]:
    """Return what the policy's ``sft_loss`` takes of one sample."""
    if kind == "vlm":
        return sample.asked, answer_text(sample, settings.prompt.answers)
    references = conditioning_frames(sample.context, settings.reference_frames, settings.conditioning)
    return references, sample.caption, sample.target_frames


def refusal(kind: str, policy: Any, sample: Sample) -> str | None:
    """Return why ``policy`` cannot learn from ``sample``, None where it can."""
    if kind == "vlm":
        try:
            policy.check_example(sample.question, answer_text(sample, policy.prompt.answers))
        except BadSampleError as error:
            return str(error)
    return None


class Items:
    """An endless, seeded stream of a rank's batches over its shard of the dataset."""

    def __init__(
        self,
        dataset: Any,
        kind: str,
        settings: SftSettings,
        shards: list[str],
        rank: int,
        samples: int,
        refused: Callable[[Sample], str | None] = lambda _: None,
    ) -> None:
        """``dataset`` is Ray Train's iterator over this rank's shard; ``samples`` is the size of the whole dataset.

        ``refused`` says why a sample cannot be learnt from; such a row is quarantined like one that cannot be decoded.
        """
        self.refused = refused
        self.dataset, self.kind, self.settings, self.rank = dataset, kind, settings, rank
        self.shards = [parse_location(path) for path in shards]
        self.quarantined: set[tuple[str, int]] = set()
        self.size = settings.tuning.batch // settings.learner.ranks
        self.cached = samples * settings.shape.row_bytes / settings.learner.ranks <= settings.tuning.cache_mib * 2**20

    def batches(self, start: int) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the batches from optimizer step ``start`` on.

        In memory each pass is a new permutation of (seed, rank, pass), so step ``start`` has the batch it would have
        had without a restart. A streamed set begins a new pass instead.
        """
        return self._from_memory(start) if self.cached else self._streamed()

    def _read(self) -> Iterator[tuple[Any, ...]]:
        found, last = 0, ""
        for block in self.dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            for index, item in enumerate(block_items(block, self.settings.shape, self.shards)):
                reason = item.reason if isinstance(item, QuarantinedRow) else self.refused(item)
                if reason is None:
                    assert isinstance(item, Sample)
                    found += 1
                    yield training_item(self.kind, item, self.settings)
                    continue
                place = self.shards[int(block["shard"][index])].name, int(block["row"][index])
                last = f"{place[0]}, row {place[1]} ({item.id}): {reason}"
                if place not in self.quarantined:
                    log.warning("left out: %s", last)
                    self.quarantined.add(place)
            broken = len(self.quarantined)
            if broken > max(self.settings.max_quarantine_ratio * (found + broken), 1) and found + broken >= 20:
                raise DataError(
                    f"{broken} of {found + broken} rows cannot be used, more than "
                    f"max_quarantine_ratio={self.settings.max_quarantine_ratio:g}; the last is {last}"
                )
        if not found:
            why = f"; the last row is {last}" if last else "; use fewer ranks or more data"
            raise DataError(f"rank {self.rank} got no usable sample{why}")

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
