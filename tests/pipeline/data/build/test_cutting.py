"""Clips are cut where they are wanted, stored once by their contents, and trimmed out of the source."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DataError
from pipeline.data.build.cutting import Cut, narrowed, trim
from pipeline.data.build.hashes import distances
from pipeline.data.build.video import Clip, Video
from pipeline.data.video import decode_video, probe
from tests.pipeline.data.build.building import LocalBuild
from tests.pipeline.data.build.footage import REAL

pytestmark = pytest.mark.slow


@pytest.fixture
def build(tmp_path: Path) -> LocalBuild:
    shutil.copy(REAL["bikes.mp4"], tmp_path / "b.mp4")
    return LocalBuild(tmp_path)


def test_a_clip_holds_the_frames_of_its_time_and_no_others(build: LocalBuild) -> None:
    video = Cut(build=build)(Video("b", "b.mp4", clips=[Clip(4, 3.04, 5.48)]))
    (clip,) = video.clips
    data = build.store.get(clip.stored)
    assert clip.stored == hashlib.sha256(data).hexdigest()
    info = probe(data)
    assert (info.frames, info.width, info.height) == (61, 640, 272)
    # Its first and last frames are those on this side of the cuts, which no key frame decides.
    ends = decode_video(data, 2, 272, 640).astype(int)
    source = decode_video(REAL["bikes.mp4"], 2, 272, 640, start=3.04, end=5.48).astype(int)
    assert np.abs(ends - source).mean() < 4
    assert clip.phash and len(clip.hashes) == pytest.approx(2.44 * 8, abs=2)


def test_cutting_again_changes_nothing_and_a_bad_clip_costs_itself(build: LocalBuild) -> None:
    def cut(width: int) -> list[str]:
        clips = [Clip(0, 0.0, 1.2), Clip(1, 60.0, 61.0), Clip(2, 1.2, 3.04)]
        video = Cut(settings=Cut.Settings(max_side=width), build=build)(Video("b", "b.mp4", clips=clips))
        assert [clip.index for clip in video.clips] == [0, 2]
        assert [(lost.what, lost.reason) for lost in video.lost] == [("clip 1", "unreadable")]
        assert "60.00–61.00 s of b.mp4" in video.lost[0].told
        return [clip.stored for clip in video.clips]

    first = cut(320)
    assert cut(320) == first and len(build.store.held) == 2
    assert probe(build.store.get(first[0])).width == 320


@given(st.floats(0.1, 60), st.floats(0, 1), st.floats(0, 1))
def test_a_narrowed_clip_lies_in_the_clip_and_has_three_to_five_seconds(
    seconds: float, one: float, other: float
) -> None:
    start, end = sorted((one * seconds, other * seconds))
    clip = Clip(0, 100.0, 100.0 + seconds)
    if end - start < 1e-6:
        return
    begin, until = narrowed(clip, start, end)
    assert 100.0 - 1e-6 <= begin < until <= clip.end + 1e-6
    assert min(3.0, seconds) - 1e-6 <= until - begin <= 5.0 + 1e-6
    if 3.0 <= end - start <= 5.0:
        assert (begin, until) == pytest.approx((100 + start, 100 + end))


def test_the_middle_of_a_long_part_is_kept_and_a_short_one_widened() -> None:
    clip = Clip(0, 10.0, 40.0)
    assert narrowed(clip, 2.0, 22.0) == pytest.approx((19.5, 24.5))
    assert narrowed(clip, 0.0, 1.0) == pytest.approx((10.0, 13.0))
    assert narrowed(clip, 29.5, 99.0) == pytest.approx((37.0, 40.0))
    for start, end in ((5.0, 5.0), (6.0, 4.0), (-1.0, 3.0), (31.0, 35.0), (float("nan"), 3.0)):
        with pytest.raises(DataError, match="does not lie in a clip of 30"):
            narrowed(clip, start, end)


def test_a_trimmed_clip_is_cut_out_of_the_source(build: LocalBuild) -> None:
    small = Cut(settings=Cut.Settings(max_side=160), build=build)
    video = small(Video("b", "b.mp4", clips=[Clip(0, 1.2, 9.2)]))
    (clip,) = video.clips
    whole = clip.stored
    trim(video, clip, 1.84, 4.28, build, small.spec, least_s=2.0)
    assert (clip.start, clip.end) == pytest.approx((3.04, 5.48))
    direct = small(Video("b", "b.mp4", clips=[Clip(0, 3.04, 5.48)])).clips[0]
    assert clip.stored == direct.stored != whole
    assert distances(clip.hashes, direct.hashes).diagonal().max() == 0
    before = clip.stored
    trim(video, clip, 0.02, 2.42, build, small.spec, least_s=2.0)  # nearly all of it
    assert clip.stored == before
    with pytest.raises(DataError):
        trim(video, clip, 3.0, 4.0, build, small.spec)
    assert clip.stored == before
