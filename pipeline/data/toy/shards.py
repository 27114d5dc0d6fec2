"""Writes the toy world as an ordinary VNEP dataset: one folder of Parquet shards per split.

Responsible for turning samples into rows. The schema and the shard format are ``pipeline.data.schema``'s, the mp4 encoding
is ``pipeline.data.video``'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.errors import DataError
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.video import encode_mp4
from pipeline.support.location import Uri, parse_location

from .language import SPOKEN
from .scene import FPS
from .world import ToySample, language_of, make_sample


def toy_row(sample: ToySample) -> Row:
    """The sample as a row; ``meta`` holds scene and true event, ``answer`` the text the VLM's SFT trains on."""
    return Row(
        id=sample.id,
        kind=sample.kind,
        question=sample.question,
        caption=sample.caption,
        input_video=encode_mp4(sample.input_frames, FPS),
        target_video=encode_mp4(sample.target_frames, FPS),
        source="toy world, pipeline.data.toy",
        meta=sample.meta_json,
        answer=sample.answer_text,
    )


def write_toy(
    out_dir: str | Path | Uri,
    train: int,
    test: int,
    seed: int = 0,
    *,
    val: int | None = None,
    sft: int = 0,
    artist: int = 0,
    language: str = "en",
    background: str | None = None,
    drawable: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, int]:
    """Writes ``out_dir/{train,val,test}`` and, where asked for, ``sft`` and ``artist``; returns rows per split.

    ``val`` (default: as many as ``test``) is for choosing, ``test`` for reporting. ``sft`` holds the VLM's SFT answers,
    30% of them wrong; ``artist`` the VDM's SFT pairs, 22% of them mismatched. Rows are a pure function of ``seed``,
    ``language``, one of ``SPOKEN``, ``background``, which stands behind all scenes where it is given, and ``drawable``: true
    captions have no word then that the artist cannot draw.
    ``progress(split, done, total)`` is called after every row. What an interrupted call has written is kept. Raises DataError for
    a negative count, for another language, for a run without training rows, and when a folder already holds a dataset.
    """
    counts = {"train": train, "val": test if val is None else val, "test": test, "sft": sft, "artist": artist}
    for split, count in counts.items():
        if count < 0 or (split == "train" and count == 0):
            raise DataError(f"{split}={count}: a toy dataset needs at least 1 training row and no negative count")
    if language not in SPOKEN:
        raise DataError(f"language={language}: the toy world speaks {', '.join(SPOKEN)}")
    out = parse_location(out_dir)
    other = {"background": background, "drawable": drawable or None}
    changed = {name: value for name, value in other.items() if value is not None}
    plans = {
        split: {"command": "toy", "split": split, "rows": count, "seed": seed, "language": language, **changed}
        for split, count in counts.items()
        if count
    }
    whole = {split for split, plan in plans.items() if ShardWriter.wrote(out / split, plan)}
    for split, plan in plans.items():
        if split in whole and len(whole) < len(plans):  # where all are there, the writer says so
            continue
        count = counts[split]
        with ShardWriter(out / split, plan=plan) as writer:
            for index in range(writer.count, count):
                spoken = language_of(index, language)
                writer.write(toy_row(make_sample(index, split, seed, spoken, background, drawable=drawable)))
                if progress is not None:
                    progress(split, index + 1, count)
    return {split: count for split, count in counts.items() if count}


def ensure_toy(
    out_dir: str | Path,
    train: int,
    test: int,
    seed: int = 0,
    *,
    sft: int = 0,
    artist: int = 0,
    background: str | None = None,
    drawable: bool = False,
) -> None:
    """As :func:`write_toy`, whole or not at all: ``out_dir`` appears when everything is in it, and is left alone where it is."""
    out = Path(out_dir)
    if out.is_dir():
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_toy(partial, train, test, seed, sft=sft, artist=artist, background=background, drawable=drawable)
    partial.rename(out)
