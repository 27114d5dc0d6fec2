"""Row 14: a build's stages that cut and gate clips, on Ray Data, beside a PyAV loop in a process on every core."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.data.build.cutting import SIDE, Cut, note_hashes
from pipeline.data.build.gates import Gates, first_refusal
from pipeline.data.build.measures import likeness, take
from pipeline.data.build.video import SOURCE_LIMITS, Clip, Video
from pipeline.data.importers.clips import ClipSpec
from pipeline.data.reading import VideoLimits
from pipeline.data.real import packaged_clips
from pipeline.data.video import decode_video, encode_mp4
from tests.benchmarks.bench import Check, Result, Size, interleave, medians, ratios, start_ray

SPANS = {  # seconds, without a cut in them
    "bigbuckbunny.mp4": ((0.0, 2.2), (2.2, 4.1), (4.1, 5.28)),
    "bikes.mp4": ((0.0, 1.2), (1.2, 3.04), (3.04, 5.48), (5.48, 7.48), (7.48, 9.68)),
    "carphone_pristine.mp4": ((0.0, 1.6), (1.6, 2.3), (2.3, 3.1), (3.1, 4.0)),
}


@dataclass
class DiskStore:
    """Clips as files by their contents."""

    folder: Path

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its name."""
        name = hashlib.sha256(data).hexdigest()
        (self.folder / name).write_bytes(data)
        return name

    def get(self, name: str) -> bytes:
        """Return the bytes of ``name``."""
        return (self.folder / name).read_bytes()


@dataclass
class Local:
    """What a build hands to its stages."""

    root: Path
    store: DiskStore
    seed: int = 0
    limits: VideoLimits = SOURCE_LIMITS


def write_sources(root: Path, size: Size) -> list[Video]:
    """Write copies of the real clips and of one that stands still, and return them with their steps."""
    copies, steps = (24, 9) if size == "full" else (1, 1)  # starting the workers takes seconds, a build takes hours
    real = {path.name: path for path in packaged_clips() if path.name in SPANS}
    still = encode_mp4(
        np.repeat(decode_video(real["bikes.mp4"], 1, 272, 640, start=4.0), 40, axis=0), 25.0, near_lossless=False
    )
    videos = []
    for copy in range(copies):
        for name, spans in (*SPANS.items(), ("still.mp4", ((0.0, 1.5),))):
            path = root / f"{copy}-{name}"
            path.write_bytes(still if name == "still.mp4" else real[name].read_bytes())
            # Later by some frames, so that copies one after the other have other clips.
            clips = [Clip(i, start + 0.04 * (copy % 6), end) for i, (start, end) in enumerate(spans[:steps])]
            videos.append(Video(path.name, path.name, order=len(videos), clips=clips))
    return videos


def loop(job: tuple[Local, Video]) -> tuple[int, list[str]]:
    """Pass one video through the same stages; returns how many clips it had, and the reasons of those refused."""
    build, video = job
    count = len(video.clips)
    done = Gates(build=build)(Cut(build=build)(video))
    return count, [told.reason for told in done.lost]


class Worker:
    """A stage in a worker of Ray Data: what a build does with each row."""

    def __init__(self, stage: type[Cut] | type[Gates], build: Local) -> None:
        self._stage = stage(build=build)
        self._stage.setup()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Pass one video through the stage."""
        return {"item": self._stage(row["item"])}


def bare(job: tuple[Local, Video]) -> tuple[int, list[str]]:
    """Cut and judge the clips of one video with PyAV alone, each decoded once; returns how many, and the reasons of those refused."""
    build, video = job
    kept: list[Clip] = []
    reasons: list[str] = []
    for clip in video.clips:
        data, frames, fps = bare_cut(build.root / video.path, clip)
        build.store.put(data)
        note_hashes(clip, frames, fps)
        found = {"seconds": clip.end - clip.start} | take(frames, fps)
        if kept:
            found["likeness"] = likeness(clip.hashes, kept[-1].hashes)
        refused = first_refusal(found, Gates.Settings())
        if refused is None:
            kept.append(clip)
        else:
            reasons.append(refused[0].reason)
    return len(video.clips), reasons


def bare_cut(path: Path, clip: Clip) -> tuple[bytes, np.ndarray, float]:
    """Return the clip as mp4 bytes, the frames that are looked at, and how many a second; the file is read once, without checks."""
    buffer = BytesIO()
    looked: list[np.ndarray] = []
    with av.open(str(path)) as container, av.open(buffer, "w", format="mp4") as output:
        source = container.streams.video[0]
        source.thread_type = "NONE"
        rate = Fraction(source.average_rate or 25)
        scale = min(1.0, ClipSpec.max_side / max(source.width, source.height))
        options = {"crf": "18", "preset": "veryfast", "x264-params": "threads=1:cpu-independent=1"}
        target = output.add_stream("libx264", rate=rate, options=options)
        target.width, target.height = (2 * round(side * scale / 2) for side in (source.width, source.height))
        target.pix_fmt = "yuv420p"
        small = min(1.0, SIDE / max(source.width, source.height))
        width, height = (round(side * small) for side in (source.width, source.height))
        container.seek(int(clip.start / source.time_base), stream=source)
        for frame in container.decode(source):
            if frame.time is None or frame.time < clip.start - 1e-3:
                continue
            if frame.time >= clip.end - 1e-3:
                break
            picture = frame.reformat(width=target.width, height=target.height, format="yuv420p")
            picture.pts, picture.time_base = len(looked), 1 / rate
            output.mux(target.encode(picture))
            looked.append(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"))
        output.mux(target.encode(None))
    return buffer.getvalue(), np.stack(looked), float(rate)


def measure(size: Size) -> Result:
    """Measure clips a second, with what starting the workers takes."""
    repeats = 2 if size == "full" else 1
    cores = len(os.sched_getaffinity(0))
    lost: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="bench-footage-") as folder:
        root, out = Path(folder, "videos"), Path(folder, "clips")
        root.mkdir()
        out.mkdir()
        videos = write_sources(root, size)
        clips = sum(len(video.clips) for video in videos)
        start_ray()
        import ray.data
        from ray.data import ActorPoolStrategy

        build = Local(root, DiskStore(out))
        with multiprocessing.get_context("spawn").Pool(cores) as processes:

            def ours() -> float:
                began = time.perf_counter()
                dataset = ray.data.from_items(videos, override_num_blocks=len(videos))
                for stage, workers in (
                    (Cut, cores),
                    (Gates, 1),
                ):  # as in the bundled recipes: cut measures, gates compare
                    dataset = dataset.map(
                        Worker,
                        fn_constructor_args=(stage, build),
                        compute=ActorPoolStrategy(size=workers),
                        num_cpus=0.5,
                    )
                done = [row["item"] for row in dataset.iter_rows()]
                lost.append(sorted(told.reason for video in done for told in video.lost))
                assert sum(len(video.clips) + len(video.lost) for video in done) == clips
                return clips / (time.perf_counter() - began)

            def in_processes(work: Callable[[Any], tuple[int, list[str]]], first: Any) -> float:
                began = time.perf_counter()
                found = list(processes.imap(work, [(first, video) for video in videos]))
                lost.append(sorted(reason for _, reasons in found for reason in reasons))
                return sum(count for count, _ in found) / (time.perf_counter() - began)

            rounds = interleave([ours, lambda: in_processes(loop, build), lambda: in_processes(bare, build)], repeats)
    assert lost[0] and all(found == lost[0] for found in lost), "all sides refuse the same clips"
    checks = (Check("clips/s, Ray Data ÷ the same on all cores", ratios(rounds), "≥", 0.9),)
    figures = medians(rounds, "clips/s, Ray Data", "clips/s, the same on all cores", "clips/s, bare PyAV on all cores")
    figures |= {"clips": float(clips), "clips refused": float(len(lost[0]))}
    notes = (
        "All sides cut the same spans of real clips (193x144 to 1280x720) to mp4s on disk and take the same measures. The baseline",
        "passes a video through the same PyAV code, in a process on every core that is up already; the stages start their workers",
        "each time, cut and gate in workers of their own, and keep the order. Bare PyAV, the last rate, also decodes each clip only",
        "once for both, and checks nothing: no limits, no file that is cut off, no times that hold in every container.",
    )
    return Result(checks, figures, notes)
