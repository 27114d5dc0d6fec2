"""A bounded cache of features by content, so that a ground-truth clip is looked at once and not once per answer.

Not responsible for computing features (``clip``) or for what is done with them (``scorer``).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np


def content_key(array: np.ndarray) -> bytes:
    """Return a key that equal contents share (dtype, shape and bytes), whoever holds them."""
    digest = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class FeatureCache:
    """Least recently used features, at most ``max_bytes`` of them. Counts hits and misses."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._items: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        """Return the features under ``key`` and mark them as used, or None."""
        found = self._items.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._items.move_to_end(key)
        return found

    def put(self, key: bytes, features: np.ndarray) -> None:
        """Keep ``features``; what was used longest ago makes room. What exceeds the whole cache is not kept."""
        if key in self._items:
            self.bytes -= self._items.pop(key).nbytes
        if features.nbytes > self.max_bytes:
            return
        while self.bytes + features.nbytes > self.max_bytes:
            _, old = self._items.popitem(last=False)
            self.bytes -= old.nbytes
        features.flags.writeable = False
        self._items[key] = features
        self.bytes += features.nbytes

    def __len__(self) -> int:
        return len(self._items)
