"""A look at an mp4's index before ffmpeg builds it in memory.

The index may say in 12 bytes that a file holds a thousand million frames, and ffmpeg then reserves memory for each. No
frame is shorter than a byte, so an index that counts more of them than the file has bytes is a lie (or the file is cut
off). Everything else about a file is ffmpeg's to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from cluster.errors import DataError

_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts", b"mvex"}
_MAX_BOXES, _MAX_DEPTH = 100_000, 8
_EDITED = 4  # times that each frame may be shown, on average, were every frame one byte long
_RUNS = {b"stts", b"ctts"}  # (count, value) pairs; the sum of the counts is the number of frames
_COUNT_AT = {b"stsz": 8, b"stz2": 8, b"trun": 4, b"elst": 4}  # where the number of frames stands in the box


def check_mp4_index(file: BinaryIO, size: int) -> None:
    """Raise DataError where ``file`` (of ``size`` bytes) is an mp4 whose index counts more frames than it has bytes.

    An edit list may show every frame again, so it multiplies them. Anything that is no mp4 passes. The file is left at
    its start.
    """
    file.seek(0)
    head = file.read(8)
    totals: dict[str, int] = {}
    try:
        # Any name may come first: ffmpeg walks past boxes that it does not know, to the index.
        if len(head) == 8 and not 2 <= int.from_bytes(head[:4], "big") < 8:
            for kind, start, end in _boxes(file, size):
                name, count = _frames(file, kind, start, end)
                totals[name] = totals.get(name, 0) + count
                frames = totals.get("frames", 0)
                if max(totals.values()) > size or frames * totals.get("edits", 0) > _EDITED * size:
                    raise DataError(
                        f"broken video: its index counts {max(totals.values())} entries, and the file has {size} bytes"
                    )
    finally:
        file.seek(0)


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start and end of the content) of the boxes; what does not fit in its parent ends with it."""
    waiting = [(0, size, 0)]
    seen = 0
    while waiting:
        at, end, depth = waiting.pop()
        while at + 8 <= end:
            seen += 1
            if seen > _MAX_BOXES:
                raise DataError(f"broken video: more than {_MAX_BOXES} boxes")
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            start = at + 8
            if length == 1:
                length, start = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0], at + 16
            elif length == 0:
                length = end - at
            if length < start - at:
                break  # no box any more
            stop = min(at + length, end)
            if kind in _PARENTS and depth < _MAX_DEPTH:
                waiting.append((start, stop, depth + 1))
            elif kind == b"cmov":
                raise DataError("broken video: its index is compressed, which is not accepted")
            else:
                yield kind, start, stop
            at += length


def _frames(file: BinaryIO, kind: bytes, start: int, end: int) -> tuple[str, int]:
    """Return what a box of an index counts, and how many of it."""
    file.seek(start)
    if kind in _COUNT_AT:
        content = file.read(_COUNT_AT[kind] + 4)
        return "edits" if kind == b"elst" else "frames", int.from_bytes(content[_COUNT_AT[kind] :], "big")
    if kind in _RUNS:
        content = file.read(end - start)[8:]
        return kind.decode(), sum(count for count, _ in struct.iter_unpack(">II", content[: len(content) // 8 * 8]))
    return "", 0
