"""Small files that would take all memory or time: refused with a reason, quickly and in little memory."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from cluster.errors import DataError
from pipeline.data.boxes import check_mp4_index
from pipeline.data.video import VideoLimits, decode_video, encode_mp4, probe


def small() -> bytes:
    return encode_mp4(np.full((6, 32, 32, 3), 90, np.uint8), 8.0)


def written(codec: str, container: str, side: int, frames: int, pixel_format: str, gap: int = 1) -> bytes:
    """Return a file of ``frames`` black frames of side x side, ``gap`` seconds apart."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=1)
        stream.width = stream.height = side
        stream.pix_fmt = pixel_format
        picture = av.VideoFrame(side, side, pixel_format)
        for plane in picture.planes:
            plane.update(bytes(plane.buffer_size))
        for index in range(frames):
            picture.pts = index * gap
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def patched(data: bytes, box: bytes, at: int, value: int) -> bytes:
    """Return the mp4 with a 32-bit number ``at`` bytes into the first ``box``."""
    start = data.index(box) + 4 + at
    return data[:start] + struct.pack(">I", value) + data[start + 4 :]


def huge_gif() -> bytes:
    gif = bytearray(written("gif", "gif", 16, 3, "bgr8"))
    gif[6:10] = struct.pack("<HH", 65500, 65500)  # the logical screen
    return bytes(gif)


def index_bomb() -> bytes:
    """An index that says: 4 000 000 000 frames of one byte. ffmpeg keeps 24 bytes for each."""
    data = patched(small(), b"stsz", 8, 4_000_000_000)
    return patched(data, b"stsz", 4, 1)


BOMBS = {
    "huge-frames": (lambda: written("mpeg4", "mp4", 4096, 2, "yuv420p"), r"pixels"),
    "huge-gif": (huge_gif, r"pixels|broken"),
    "days-long": (lambda: written("libx264", "mp4", 32, 3, "yuv420p", gap=10_000), "longer than 3600 s"),
    "many-frames": (lambda: written("libx264", "mp4", 16, 2500, "yuv420p"), "more than 2000 frames|longer than"),
    "many-gif-frames": (lambda: written("gif", "gif", 16, 2500, "bgr8"), "more than 2000 frames|longer than"),
    "index": (index_bomb, "index counts 4000000000 entries"),
    "index behind another box": (lambda: b"\0\0\0\x08junk" + index_bomb(), "index counts 4000000000 entries"),
    "times": (lambda: patched(small(), b"stts", 8, 2_000_000_000), "index counts 2000000000 entries"),
    "cut-index": (lambda: small()[: small().index(b"stbl") + 60], "broken|no video|not known|no frames|no size"),
    "compressed-index": (lambda: small().replace(b"trak", b"cmov"), "compressed"),
}
LIMITS = VideoLimits(max_pixels=1920 * 1080, max_frames=2000)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory_and_time(name: str) -> None:
    make, message = BOMBS[name]
    data = make()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for attempt in (lambda: decode_video(data, 4, 16, 16, LIMITS), lambda: probe(data, LIMITS)):
        with pytest.raises(DataError, match=message):
            attempt()
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_memory_of_a_bomb_is_bounded_from_the_start(tmp_path: Path) -> None:
    """In a process that may take 512 MiB more than its imports did: nothing is even asked for."""
    for name in ("index", "huge-frames", "huge-gif"):
        (tmp_path / name).write_bytes(BOMBS[name][0]())
    story = """
import resource, sys
from pathlib import Path
from cluster.errors import DataError
from pipeline.data.video import VideoLimits, decode_video
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 512 * 2**20,) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode_video(path, 4, 16, 16, VideoLimits(max_pixels=1920 * 1080))
    except DataError as error:
        print(path.name, error)
"""
    command = [sys.executable, "-c", story, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 and "allocate" not in done.stdout


def test_a_pass_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small()
    now = iter(range(0, 100_000, 10))
    monkeypatch.setattr("pipeline.data.reading.time.thread_time", lambda: float(next(now)))
    with pytest.raises(DataError, match="took more than 25 s"):
        decode_video(data, 4, 16, 16, VideoLimits(max_decode_s=25.0))


@pytest.mark.parametrize("options", [{}, {"movflags": "+faststart"}, {"movflags": "frag_keyframe+empty_moov"}])
def test_honest_files_pass_the_look_at_the_index(options: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "honest.mp4"
    with av.open(str(path), "w", format="mp4", options=options) as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for index in range(60):  # with B-frames: the index has composition times and an edit list
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), index, np.uint8), format="rgb24")
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    check_mp4_index(io.BytesIO(data), len(data))
    assert decode_video(data, 60, 16, 16).shape == (60, 16, 16, 3)


def test_edits_and_fragments_cannot_multiply_the_index() -> None:
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    fragment = box(b"moof", box(b"traf", box(b"trun", struct.pack(">II", 0, 3_000_000_000))))
    edits = box(b"edts", box(b"elst", struct.pack(">II", 0, 900) + bytes(12 * 900)))
    track = box(
        b"trak", box(b"mdia", box(b"minf", box(b"stbl", box(b"stsz", struct.pack(">III", 0, 1, 5000))))) + edits
    )
    for content in (fragment, box(b"moov", track)):
        data = box(b"ftyp", b"isom" * 4) + content
        with pytest.raises(DataError, match="index counts"):
            check_mp4_index(io.BytesIO(data), len(data))
    deep = box(b"moov", b"")
    for _ in range(2000):
        deep = box(b"moov", deep)
    check_mp4_index(io.BytesIO(deep), len(deep))  # neither recursion nor a hang
