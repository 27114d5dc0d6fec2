"""Clips to begin with on the playground: of the run's held-out set, with their questions. Reads a few rows; no Ray, no Gradio."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.errors import VansError
from pipeline.config import RunConfig
from pipeline.data.schema import open_shard, shard_paths

COUNT = 4
MOST_BYTES = 8 << 20  # of all of them: they travel to the ingress with its arguments


@dataclass(frozen=True)
class Example:
    """A clip (mp4) and what is asked about it."""

    question: str
    video: bytes


def held_out(config: RunConfig, run: Path | None) -> tuple[Example, ...]:
    """Return the first held-out samples of a run whose data are here; none of one whose are not."""
    folders = [config.data.eval, *([run / "data" / "test"] if run is not None else [])]
    for folder in folders:
        try:
            return _first(folder)
        except (VansError, OSError):
            continue
    return ()


def _first(folder: object) -> tuple[Example, ...]:
    found: list[Example] = []
    with open_shard(shard_paths(folder)[0]) as shard:  # type: ignore[arg-type]
        for batch in shard.iter_batches(COUNT, columns=["question", "input_video"]):
            found += [Example(row["question"], row["input_video"]) for row in batch.to_pylist()]
            break
    while sum(len(example.video) for example in found) > MOST_BYTES:
        found.pop()
    return tuple(found)
