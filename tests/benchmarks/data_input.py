"""Row 5: the Ray Data source of a run beside PyAV in a process on every core."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.data.decoder import VideoShape
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.source import SampleSource
from pipeline.data.toy.world import make_sample
from pipeline.data.video import decode_video, encode_mp4
from tests.benchmarks.bench import Check, Result, Size, interleave, medians, ratios, start_ray

SCALE = 8
FRAMES = 9


def write_shards(folder: Path, rows: int) -> VideoShape:
    """Write ``rows`` samples of the toy world, enlarged to 256 pixels, and return their shape."""
    with ShardWriter(folder, rows_per_shard=32) as writer:
        for i in range(rows):
            s = make_sample(i, "train")
            clips = [
                np.kron(f[:FRAMES], np.ones((1, SCALE, SCALE, 1), np.uint8)) for f in (s.input_frames, s.target_frames)
            ]
            videos = [encode_mp4(clip, 8.0) for clip in clips]
            writer.write(Row(s.id, s.kind, s.question, s.caption, *videos, source="benchmark", answer=s.answer_text))
    side = SCALE * s.target_frames.shape[1]
    return VideoShape(num_frames=FRAMES, height=side, width=side, input_frames=FRAMES, vlm_height=side, vlm_width=side)


def decode_pair(videos: tuple[bytes, bytes, int, int]) -> list[np.ndarray]:
    """Decode input and answer of one row."""
    first, second, height, width = videos
    return [decode_video(video, FRAMES, height, width) for video in (first, second)]


def measure(size: Size) -> Result:
    """Measure clips/s, and seconds until the first batch."""
    rows, repeats, batch = (768, 3, 8) if size == "full" else (16, 1, 8)
    cores = len(os.sched_getaffinity(0))
    firsts: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        shape = write_shards(Path(folder), rows)
        start_ray(object_store_mib=1024)
        source = SampleSource(folder, shape, decoders=cores)
        with multiprocessing.get_context("spawn").Pool(cores) as processes:

            def ours() -> float:
                began = time.perf_counter()
                done = 0
                with closing(source.batches(batch)) as batches:
                    for found in batches:
                        if not done:
                            firsts.append(time.perf_counter() - began)
                        done += len(found.samples)
                        if done >= rows:
                            break
                return 2 * done / (time.perf_counter() - began)

            def theirs() -> float:
                began = time.perf_counter()
                table = pq.read_table(folder, columns=["input_video", "target_video"])
                pairs = zip(table["input_video"].to_pylist(), table["target_video"].to_pylist(), strict=True)
                jobs = ((a, b, shape.height, shape.width) for a, b in pairs)
                done = sum(len(found) for found in processes.imap(decode_pair, jobs, chunksize=4))
                return done / (time.perf_counter() - began)

            rounds = interleave([ours, theirs], repeats)
    checks = (
        Check("clips/s, Ray Data ÷ PyAV on all cores", ratios(rounds), "≥", 0.9),
        Check("first batch", tuple(firsts[1:]), "≤", 3.0, "s"),
    )
    figures = medians(rounds, "clips/s, Ray Data", "clips/s, PyAV on all cores")
    figures |= {"clips": 2.0 * rows, "pixels of a side": float(shape.height)}
    notes = (
        "Both read the same Parquet shards and hand decoded uint8 frames of input and answer to the driver's process. PyAV runs in a",
        "process on every core that is up already; the source begins a new streaming execution each time, checks every row, keeps",
        "the order of seed and epoch, and decodes ahead within its memory budget.",
    )
    return Result(checks, figures, notes)
