"""The sample stream over Ray Data: order, exact resume, quarantine. One embedded cluster for the module."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from pipeline.data import source as source_module
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.source import Batch, Cursor, SampleSource, VideoShape, load_all
from pipeline.data.video import encode_mp4
from pipeline.stages.feed import FeedCursor, SampleFeed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
SHAPE = VideoShape(num_frames=5, height=16, width=16, input_frames=3, vlm_height=24, vlm_width=24)


def clip(value: int) -> bytes:
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[..., 0] = value
    frames[..., 1] = 10 * np.arange(5)[:, None, None]
    return encode_mp4(frames, 8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows in 3 shards; row 7 has a broken target, row 13 an input that is no video."""
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder, rows_per_shard=9) as writer:
        for index in range(23):
            video, target = clip(40 + index), clip(140 + index)
            if index == 7:
                target = target[: len(target) // 2]
            if index == 13:
                video = b"not a video"
            kind = "procedural" if index % 2 else "predictive"
            answer = f"<think>x</think><ans>caption {index}</ans>" if index == 2 else None
            writer.write(
                Row(f"r{index:02}", kind, "what next?", f"caption {index}", video, target, "test", "{}", answer)
            )
    return folder


def take(source: SampleSource, size: int, batches: int, cursor: Cursor | None = None) -> list[Batch]:
    stream = source.batches(size, cursor)
    taken = list(itertools.islice(stream, batches))
    stream.close()
    return taken


def open_source(folder: Path, **options: object) -> SampleSource:
    return SampleSource(folder, SHAPE, **{"seed": 3, "max_quarantine_ratio": 0.2, **options})  # type: ignore[arg-type]


def test_batches_are_full_in_an_order_of_seed_and_epoch_and_broken_rows_are_counted(
    folder: Path, tmp_path: Path
) -> None:
    source = open_source(folder)
    batches = take(source, 6, 8)  # 48 samples: past the second epoch of 21 usable rows
    assert all(len(batch.samples) == 6 for batch in batches)
    ids = [sample.id for batch in batches for sample in batch.samples]
    order = [f"r{row:02}" for epoch in range(3) for row in source.order(epoch)]
    assert ids == [name for name in order if name not in ("r07", "r13")][:48]
    assert sorted(ids[:21]) == sorted(set(ids)), "an epoch holds every usable row once"
    assert ids[:21] != ids[21:42], "epochs are shuffled differently"

    first_epoch = [item for batch in batches for item in batch.quarantined if item.epoch == 0]
    assert {item.id for item in first_epoch} == {"r07", "r13"}
    assert len(source.quarantined) == 2, "a row is counted once, however often it comes by"
    reasons = {item.id: item.reason for item in source.quarantined}
    assert reasons["r07"].startswith("target video: ") and reasons["r13"].startswith("input video: broken video")


def test_frames_of_both_sizes_reach_the_sample(folder: Path) -> None:
    (batch,) = take(open_source(folder, shuffle=False), 3, 1)
    sample = batch.samples[2]
    assert (
        sample.id == "r02" and sample.answer == "<think>x</think><ans>caption 2</ans>" and sample.kind == "predictive"
    )
    assert batch.samples[0].answer is None
    assert sample.input_frames.shape == (3, 24, 24, 3) and sample.input_frames.dtype == np.uint8
    assert sample.context_frames is not None and sample.context_frames.shape == (3, 16, 16, 3)
    assert sample.target_frames.shape == (5, 16, 16, 3)
    assert np.abs(sample.target_frames[..., 0].astype(int) - 142).max() <= 3
    assert np.abs(sample.context_frames[:, 0, 0, 1].astype(int) - [0, 20, 40]).max() <= 3
    assert sample.fps == 4.0, "three frames spread over half a second"


def test_pictures_in_a_budget_and_a_clip_for_the_artist_pass_through_ray_data(folder: Path) -> None:
    shape = replace(SHAPE, vlm_pixels=(1000, 3000), vlm_multiple=16, context_frames=5)
    source = SampleSource(folder, shape, seed=3, max_quarantine_ratio=0.2, shuffle=False)
    (batch,) = take(source, 3, 1)
    sample = batch.samples[2]
    assert sample.id == "r02" and sample.input_frames.shape == (3, 32, 32, 3)  # of 16x16, at least 1000 pixels
    assert sample.context.shape == (5, 16, 16, 3)
    assert np.abs(sample.input_frames[:, 0, 0, 1].astype(int) - [0, 20, 40]).max() <= 3
    assert np.abs(sample.context[:, 0, 0, 1].astype(int) - [0, 10, 20, 30, 40]).max() <= 3


def test_a_new_source_resumes_with_exactly_the_next_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SEGMENT_ROWS", 32)  # so that an execution begins in the middle of an epoch too
    whole = take(open_source(folder), 5, 7)
    stored = whole[1].cursor.to_dict()
    rest = take(open_source(folder, decoders=2), 5, 5, Cursor.of(stored))
    for expected, found in zip(whole[2:], rest, strict=True):
        assert [s.id for s in found.samples] == [s.id for s in expected.samples]
        assert found.quarantined == expected.quarantined and found.cursor == expected.cursor
        for a, b in zip(expected.samples, found.samples, strict=True):
            assert np.array_equal(a.input_frames, b.input_frames) and np.array_equal(a.target_frames, b.target_frames)


def test_a_feed_of_real_shards_that_is_resumed_again_and_again_draws_every_row_once(folder: Path) -> None:
    def drawn(feed: SampleFeed, count: int) -> list[str]:
        return [sample.id for sample in asyncio.run(feed.draw(count))]

    source, cursor, found = open_source(folder), FeedCursor(Cursor()), []
    for size, count in ((4, 3), (4, 3), (1, 4), (1, 14)):
        feed = SampleFeed(source, size, cursor)
        found += drawn(feed, count)
        cursor = FeedCursor.from_json(feed.cursor.to_json())
        feed.close()
    order = [f"r{row:02}" for epoch in range(2) for row in source.order(epoch)]
    assert found == [name for name in order if name not in ("r07", "r13")][:24]


def test_too_many_broken_rows_stop_with_their_reasons(folder: Path) -> None:
    source = open_source(folder, max_quarantine_ratio=0.05)  # 2 of 23 is more
    with pytest.raises(DataError, match=r"(?s)max_quarantine_ratio=0\.05.*part-0000[01]\.parquet row \d+ .*video"):
        take(source, 4, 6)


def test_evaluation_sets_load_in_stored_order(folder: Path) -> None:
    batch = load_all(folder, SHAPE, 8, max_quarantine_ratio=0.2)
    assert [s.id for s in batch.samples] == ["r00", "r01", "r02", "r03", "r04", "r05", "r06", "r08"]
    assert [item.id for item in batch.quarantined] == ["r07"]
    with pytest.raises(DataError, match="23 rows, 2 of them broken; 23 samples were asked for"):
        load_all(folder, SHAPE, 23, max_quarantine_ratio=0.2, decoders=2)


def test_a_damaged_row_group_quarantines_its_rows(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, group_bytes=2000) as writer:
        for index in range(8):
            writer.write(Row(f"r{index}", "procedural", "q?", "c", clip(index), clip(index)))
    path = tmp_path / "part-00000.parquet"
    group = pq.read_metadata(path).row_group(1)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "input_video")
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\x55" * column.total_compressed_size
    path.write_bytes(data)
    batch = SampleSource(tmp_path, SHAPE, max_quarantine_ratio=0.9, shuffle=False).load_all()
    assert len(batch.samples) == 8 - group.num_rows
    assert len(batch.quarantined) == group.num_rows
    assert all("damaged row group 1" in item.reason for item in batch.quarantined)


def test_the_digest_follows_the_content(folder: Path, tmp_path: Path) -> None:
    rows = [Row(f"r{i}", "procedural", "q?", "c", b"v", b"v") for i in range(3)]
    for name, data in (("a", rows), ("b", rows), ("c", rows[::-1])):
        with ShardWriter(tmp_path / name) as writer:
            for row in data:
                writer.write(row)
    digest = {name: SampleSource(tmp_path / name, SHAPE).digest for name in "abc"}
    assert digest["a"] == digest["b"] != digest["c"]
    table = pq.read_table(tmp_path / "a" / "part-00000.parquet").replace_schema_metadata(None)
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "foreign.parquet")  # written by others: hashed whole
    assert len(SampleSource(tmp_path / "d", SHAPE).digest) == 64
