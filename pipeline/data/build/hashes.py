"""Perceptual hashes of frames: what stays nearly the same when a video is encoded anew, resized or cut elsewhere.

A hash is the signs of a picture's 64 lowest frequencies against their median (pHash: Zauner 2010, Implementation and
benchmarking of perceptual image hash functions). Two hashes are compared by how many bits differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from scipy.fft import dctn

BITS = 64
SAME = 7
"""Bits that may differ between the hashes of one picture before and after it was encoded anew, or resized. The index finds them all."""
PLAIN = (
    6.0  # standard deviation, in grey levels, below which a picture has nothing that a hash could hold: black, a fade
)
_SIDE, _LOW = 32, 8


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


class HashIndex:
    """Finds which keys have a hash within :data:`SAME` bits of a given one.

    A hash is filed by each of its four quarters. Where two differ by at most 7 bits, one quarter differs by at most one bit: so
    a search opens 4 · 17 drawers, and compares what is in these alone (multi-index hashing: Norouzi et al. 2012, arXiv:1307.2982).
    """

    def __init__(self) -> None:
        self._drawers: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(4)]
        self._hashes: list[int] = []
        self._keys: list[int] = []

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, key: int, hashes: Iterable[int]) -> None:
        """File ``hashes`` under the number ``key``."""
        for value in map(int, hashes):
            place = len(self._hashes)
            self._hashes.append(value)
            self._keys.append(key)
            for drawer, quarter in zip(self._drawers, _quarters(value)):
                drawer[quarter].append(place)

    def find(self, value: int) -> set[int]:
        """Return the keys with a hash that differs from ``value`` by at most :data:`SAME` bits."""
        value = int(value)
        found: set[int] = set()
        for drawer, quarter in zip(self._drawers, _quarters(value)):
            for probe in (quarter, *(quarter ^ (1 << bit) for bit in range(16))):
                for place in drawer.get(probe, ()):
                    key = self._keys[place]
                    if key not in found and (self._hashes[place] ^ value).bit_count() <= SAME:
                        found.add(key)
        return found


def _quarters(value: int) -> tuple[int, int, int, int]:
    return value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 0xFFFF, value >> 48 & 0xFFFF
