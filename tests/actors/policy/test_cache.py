"""The cache of what frozen models make: bounded in bytes, least recently used first out, and read-only."""

from __future__ import annotations

import numpy as np
import pytest

from actors.policy.cache import Cache, content_key


def features(value: float, rows: int = 2) -> np.ndarray:
    return np.full((rows, 4), value, np.float32)  # 16 bytes a row


def test_what_was_used_longest_ago_makes_room() -> None:
    cache = Cache[np.ndarray](max_bytes=3 * 32)
    for name in (b"a", b"b", b"c"):
        cache.put(name, features(1.0))
    assert (len(cache), cache.bytes) == (3, 96)  # exactly full
    assert cache.find(b"a") is not None  # used again, so b is the oldest
    cache.put(b"d", features(2.0))
    assert [cache.find(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert (cache.hits, cache.misses, cache.bytes) == (4, 1, 96)
    cache.put(b"e", features(3.0, rows=5))  # 80 bytes: two have to go, and the third as well
    assert (len(cache), cache.bytes) == (1, 80)


def test_the_same_key_is_kept_once() -> None:
    cache = Cache[np.ndarray](max_bytes=100)
    cache.put(b"a", features(1.0))
    cache.put(b"a", features(2.0, rows=3))
    found = cache.find(b"a")
    assert (len(cache), cache.bytes) == (1, 48) and found is not None and found[0, 0] == 2.0


def test_what_exceeds_the_whole_cache_is_not_kept_and_costs_the_others_nothing() -> None:
    cache = Cache[np.ndarray](max_bytes=64)
    cache.put(b"a", features(1.0))
    cache.put(b"big", features(1.0, rows=5))
    assert cache.find(b"big") is None and cache.find(b"a") is not None and cache.bytes == 32
    cache.put(b"whole", features(1.0, rows=4))
    assert cache.find(b"whole") is not None and cache.bytes == 64
    cache.put(b"whole", features(1.0, rows=5))  # what is under the key is no longer it
    assert cache.find(b"whole") is None and cache.bytes == 0


def test_what_is_not_held_is_made_once_and_given_all_the_same() -> None:
    cache, made = Cache[np.ndarray](max_bytes=32), []

    def make(rows: int) -> np.ndarray:
        made.append(rows)
        return features(1.0, rows)

    assert len(cache.get("a", lambda: make(2))) == len(cache.get("a", lambda: make(2))) == 2
    assert len(cache.get("big", lambda: make(5))) == len(cache.get("big", lambda: make(5))) == 5
    assert made == [2, 5, 5] and cache.holds("a") and not cache.holds("big")
    assert (cache.hits, cache.misses) == (1, 3)


def test_kept_features_cannot_be_changed() -> None:
    cache = Cache[np.ndarray](max_bytes=64)
    cache.put(b"a", features(1.0))
    found = cache.find(b"a")
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0.0


def test_keys_are_contents() -> None:
    one = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert content_key(one) == content_key(one.copy()) == content_key(np.asfortranarray(one))
    others = [one.reshape(4, 3), one.astype(np.int8), one.T, one + 1]
    assert len({content_key(array) for array in (one, *others)}) == 5
