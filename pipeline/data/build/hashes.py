"""Perceptual hashes of frames: what stays nearly the same when a video is encoded anew, resized or cut elsewhere.

A hash is the signs of a picture's 64 lowest frequencies against their median (pHash: Zauner 2010, Implementation and
benchmarking of perceptual image hash functions). Two hashes are compared by how many bits differ.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import cv2
import numpy as np
from scipy.fft import dctn

Key = TypeVar("Key", bound=Hashable)
BITS = 64
SAME = 7
"""Bits that may differ between the hashes of one picture before and after it was encoded anew, or resized. The index finds them all."""
NEAR = 2  # bits between the hashes of two frames of a video that show the same
SHARE = 0.3
"""Share of a clip's frames that are found again in a part of it that was cut elsewhere. In fast motion many of its frames fall between
those that were hashed; clips of other scenes share none."""
PLAIN = 6.0
"""Standard deviation, in grey levels, below which a picture has nothing that a hash could hold: black, a fade."""
_SIDE, _LOW = 32, 8


def one_thread() -> None:
    """Keep OpenCV to one thread in this process: a build has a worker for each core."""
    cv2.setNumThreads(1)


def luma(frames: np.ndarray) -> np.ndarray:
    """Return the brightness of uint8 RGB ``frames`` (T, H, W, 3) as uint8 (T, H, W), by BT.601."""
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def frame_hashes(frames: np.ndarray) -> np.ndarray:
    """Return the hash of each of the uint8 RGB ``frames`` (T, H, W, 3) that is not plain, in order: uint64 (N ≤ T)."""
    small = np.stack([cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for grey in luma(frames)])
    small = small[small.std(axis=(1, 2)) >= PLAIN].astype(np.float64)
    if not len(small):
        return np.empty(0, np.uint64)
    low = dctn(small, axes=(1, 2), norm="ortho")[:, :_LOW, :_LOW].reshape(-1, BITS)
    return _packed(low > np.median(low, axis=1, keepdims=True))


def common_hash(hashes: np.ndarray) -> int:
    """Return the bits that most of the ``hashes`` have, as one hash; 0 where there is none."""
    if not len(hashes):
        return 0
    bits = np.unpackbits(np.asarray(hashes, np.uint64)[:, None].view(np.uint8), axis=1, bitorder="little")
    return int(_packed(2 * bits.sum(axis=0, dtype=int) > len(hashes))[0])


def distances(one: np.ndarray | Sequence[int], other: np.ndarray | Sequence[int]) -> np.ndarray:
    """Return how many bits differ between each hash of ``one`` and each of ``other``: int (N, M)."""
    first, second = (np.asarray(hashes, np.uint64).reshape(-1) for hashes in (one, other))
    return np.bitwise_count(first[:, None] ^ second[None, :]).astype(int)


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(np.atleast_2d(bits), axis=1, bitorder="little").view(np.uint64).reshape(-1)


def thinned(hashes: Iterable[int]) -> list[int]:
    """Return ``hashes`` of successive frames without those that show what the last one kept shows."""
    kept: list[int] = []
    for value in map(int, hashes):
        if not kept or (kept[-1] ^ value).bit_count() > NEAR:
            kept.append(value)
    return kept


class HashIndex:
    """Finds the hashes within :data:`SAME` bits of a given one among very many, by their numbers.

    A hash is filed by each of its four quarters. Where two differ by at most 7 bits, one quarter differs by at most one bit: so
    a search opens 4 · 17 drawers, and compares what is in these alone (multi-index hashing: Norouzi et al. 2012, arXiv:1307.2982).
    A hash takes some 40 bytes.
    """

    def __init__(self) -> None:
        self._drawers: list[dict[int, array[int]]] = [defaultdict(lambda: array("I")) for _ in range(4)]
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, value: int) -> int:
        """File the hash ``value`` and return its number, counted from 0."""
        number = len(self._hashes)
        self._hashes.append(value)
        for drawer, quarter in zip(self._drawers, _quarters(value)):
            drawer[quarter].append(number)
        return number

    def find(self, value: int) -> set[int]:
        """Return the numbers of the hashes that differ from ``value`` by at most :data:`SAME` bits."""
        found: set[int] = set()
        for drawer, quarter in zip(self._drawers, _quarters(value)):
            for probe in (quarter, *(quarter ^ (1 << bit) for bit in range(16))):
                for number in drawer.get(probe, ()):
                    if (self._hashes[number] ^ value).bit_count() <= SAME:
                        found.add(number)
        return found


class SeenClips(Generic[Key]):
    """Clips by the hashes of their frames, and which of them another one shows again, in part or whole.

    Two clips show the same where :data:`SHARE` of the frames of one, at least two where it has two, are in the other. ``most``: frames
    that are kept of a clip, evenly spread; all where it is None.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._index = HashIndex()
        self._owner = array("I")  # of each filed hash, a place in the next two
        self._keys: list[Key] = []
        self._sizes = array("I")

    def add(self, key: Key, hashes: Iterable[int]) -> None:
        """Keep a clip under ``key``, which several may share; ``hashes``: of its frames, in order."""
        kept = thinned(hashes)
        if self._most is not None and len(kept) > self._most:
            kept = [kept[round(place)] for place in np.linspace(0, len(kept) - 1, self._most)]
        for value in kept:
            self._index.add(value)
            self._owner.append(len(self._keys))
        self._keys.append(key)
        self._sizes.append(len(kept))

    def find(self, hashes: Iterable[int]) -> set[Key]:
        """Return the keys of the clips that show what the clip with ``hashes`` does."""
        asked = thinned(hashes)
        theirs: defaultdict[int, set[int]] = defaultdict(set)  # frames of a kept clip that are in this one
        ours: Counter[int] = Counter()  # frames of this one that are in a kept clip
        for value in asked:
            numbers = self._index.find(value)
            for number in numbers:
                theirs[self._owner[number]].add(number)
            ours.update({self._owner[number] for number in numbers})
        return {
            self._keys[owner]
            for owner, numbers in theirs.items()
            if _enough(len(numbers), self._sizes[owner]) or _enough(ours[owner], len(asked))
        }


def _enough(shared: int, frames: int) -> bool:
    return shared >= max(SHARE * frames, min(2, frames))


def _quarters(value: int) -> tuple[int, int, int, int]:
    return value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 0xFFFF, value >> 48 & 0xFFFF
