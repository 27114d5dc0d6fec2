"""A split is of whole videos, decided by their names alone, and videos that show the same are not divided."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.build.evaluation import video_hashes
from pipeline.data.build.splits import TRAIN, Splitter, split_of
from pipeline.data.build.video import Clip, Video
from tests.pipeline.data.build.footage import CODECS, REAL, coded_anew


def hashes(seed: int, count: int = 12) -> list[int]:
    return [int(value) for value in np.random.default_rng(seed).integers(0, 2**63, count)]


def video(name: str, *clips: list[int]) -> Video:
    return Video(name, f"{name}.mp4", clips=[Clip(i, i, i + 1.0, hashes=clip) for i, clip in enumerate(clips)])


def test_shares_are_kept_over_many_names_and_another_seed_splits_otherwise() -> None:
    shares = {"test": 0.02, "val": 0.1}
    found = [split_of(f"video {i}", shares, 0) for i in range(5000)]
    assert found.count("test") / 5000 == pytest.approx(0.02, abs=0.006)
    assert found.count("val") / 5000 == pytest.approx(0.1, abs=0.013)
    assert [split_of(f"video {i}", shares, 0) for i in range(50)] == found[:50]
    assert [split_of(f"video {i}", shares, 1) for i in range(5000)] != found


@given(st.text(max_size=20), st.floats(0, 0.5), st.floats(0, 0.4), st.integers(0, 9))
def test_a_larger_share_keeps_what_a_smaller_one_had(name: str, share: float, more: float, seed: int) -> None:
    if split_of(name, {"test": share}, seed) == "test":
        assert split_of(name, {"test": share + more}, seed) == "test"


def names_of(split: str, count: int) -> list[str]:
    found = [name for name in (f"v{i}" for i in range(200)) if split_of(name, {"test": 0.5}, 7) == split]
    return found[:count]


def test_a_near_duplicate_goes_where_the_first_one_went() -> None:
    (first, *_), (train, other) = names_of("test", 1), names_of(TRAIN, 2)
    splitter = Splitter({"test": 0.5}, 7)
    assert splitter.assign(video(first, hashes(1), hashes(2))) == "test"
    again = [value ^ 0b11 for value in hashes(2)[3:9]]  # a part of its second clip, coded anew
    assert splitter.assign(video(train, hashes(3), again)) == "test"
    assert splitter.assign(video(other, hashes(4))) == TRAIN


def test_a_video_that_shows_what_lies_in_two_splits_is_lost() -> None:
    (test,), (train, both) = names_of("test", 1), names_of(TRAIN, 2)
    splitter = Splitter({"test": 0.5}, 7)
    splitter.assign(video(test, hashes(1)))
    splitter.assign(video(train, hashes(2)))
    lost = video(both, hashes(1), hashes(2))
    assert splitter.assign(lost) is None
    assert lost.lost[0].reason == "near two splits"
    assert f"{test!r} (test) and {train!r} (train)" in lost.lost[0].told


@pytest.mark.parametrize(("codec", "size", "options"), CODECS, ids=[codec for codec, *_ in CODECS])
def test_real_footage_coded_anew_goes_where_the_first_one_went(
    codec: str, size: tuple[int, int], options: dict[str, str]
) -> None:
    (test,), (street, other) = names_of("test", 1), names_of(TRAIN, 2)
    splitter = Splitter({"test": 0.5}, 7)
    whole = video_hashes(REAL["bikes.mp4"])  # 8 a second; its shots are
    shots = [whole[round(8 * start) : round(8 * end)] for start, end in pairwise([0, 1.2, 3.04, 5.48, 7.48, 9.68])]
    assert splitter.assign(video(test, *shots)) == "test"
    assert splitter.assign(video(street, video_hashes(coded_anew("bikes.mp4", codec, size, options)))) == "test"
    assert splitter.assign(video(other, video_hashes(REAL["carphone_pristine.mp4"]))) == TRAIN


def test_without_shares_all_is_train() -> None:
    assert Splitter({}, 0).assign(video("a", hashes(1))) == TRAIN
