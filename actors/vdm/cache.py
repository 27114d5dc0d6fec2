"""A least-recently-used cache of tensors, bounded in bytes: caption embeddings and frame latents are made once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from torch import Tensor


class TensorCache:
    """Maps a key to a tensor that must not be modified; beyond ``max_bytes`` the least recently used ones go."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self._bytes = 0
        self._items: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of ``key``, calling ``make`` when it is not held."""
        if key in self._items:
            self.hits += 1
            self._items.move_to_end(key)
            return self._items[key]
        self.misses += 1
        value = self._items[key] = make()
        self._bytes += value.nbytes
        while self._bytes > self.max_bytes and len(self._items) > 1:
            self._bytes -= self._items.popitem(last=False)[1].nbytes
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self._bytes = 0


def content_key(frames: np.ndarray) -> str:
    """Return a key of what ``frames`` shows: equal frames, equal key, in any process."""
    digest = hashlib.blake2b(np.ascontiguousarray(frames).tobytes(), digest_size=16)
    return f"{frames.dtype}{frames.shape}{digest.hexdigest()}"
