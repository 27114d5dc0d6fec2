"""A least-recently-used cache, bounded in bytes: caption embeddings and frame latents are made once."""

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


class TensorCache(Generic[V]):
    """Maps a key to a tensor that must not be modified; beyond ``max_bytes`` the least recently used ones go."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self._bytes = 0
        self._items: OrderedDict[Hashable, V] = OrderedDict()

    def find(self, key: Hashable) -> V | None:
        """Return the tensor of ``key`` where it is held."""
        value = self._items.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._items.move_to_end(key)
        return value

    def holds(self, key: Hashable) -> bool:
        """Whether the tensor of ``key`` is held; not counted as asking for it."""
        return key in self._items

    def put(self, key: Hashable, value: V) -> V:
        """Hold ``value`` under a new ``key`` and return it."""
        self._items[key] = value
        self._bytes += value.nbytes
        while self._bytes > self.max_bytes and len(self._items) > 1:
            self._bytes -= self._items.popitem(last=False)[1].nbytes
        return value

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the tensor of ``key``, calling ``make`` when it is not held."""
        value = self.find(key)
        return self.put(key, make()) if value is None else value

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self._bytes = 0


def content_key(frames: np.ndarray) -> str:
    """Return a key of what ``frames`` shows: equal frames, equal key, in any process."""
    digest = hashlib.blake2b(np.ascontiguousarray(frames).tobytes(), digest_size=16)
    return f"{frames.dtype}{frames.shape}{digest.hexdigest()}"
