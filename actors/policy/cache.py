"""One least-recently-used cache, bounded in bytes, for what frozen models make: embeddings, latents, features.

Not responsible for making them, nor for what is done with them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import numpy as np


class Sized(Protocol):
    """A tensor, an array, or a record of some."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class Cache(Generic[V]):
    """Maps a key to a tensor, an array or a record that must not be modified.

    Holds at most ``max_bytes``: what was used longest ago makes room, and a value larger than the whole cache is not held.
    Arrays become read-only. Counts hits and misses.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.bytes = 0
        self._items: OrderedDict[Hashable, V] = OrderedDict()

    def find(self, key: Hashable) -> V | None:
        """Return the value of ``key`` where it is held, and mark it as used."""
        value = self._items.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._items.move_to_end(key)
        return value

    def holds(self, key: Hashable) -> bool:
        """Whether the value of ``key`` is held; not counted as asking for it."""
        return key in self._items

    def put(self, key: Hashable, value: V) -> V:
        """Hold ``value`` under ``key`` in place of what was there, where it fits, and return it."""
        if key in self._items:
            self.bytes -= self._items.pop(key).nbytes
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
        if value.nbytes > self.max_bytes:
            return value
        while self.bytes + value.nbytes > self.max_bytes:
            self.bytes -= self._items.popitem(last=False)[1].nbytes
        self._items[key] = value
        self.bytes += value.nbytes
        return value

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of ``key``, calling ``make`` when it is not held."""
        value = self.find(key)
        return self.put(key, make()) if value is None else value

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._items)


def content_key(array: np.ndarray) -> str:
    """Return a key that equal contents share (dtype, shape and bytes), in any process."""
    digest = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
    return f"{array.dtype}{array.shape}{digest.hexdigest()}"
