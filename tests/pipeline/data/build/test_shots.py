"""Shots are found where the cuts are: at those that pairs.json names in the real clips, and at made-up ones."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.build.shots import Shots, find_shots, in_parts
from pipeline.data.build.video import Video
from pipeline.data.importers.cut import read_cuts
from pipeline.data.real import MANIFEST, packaged_clips
from pipeline.data.video import encode_mp4
from tests.pipeline.data.build.building import LocalBuild

REAL = {path.name: path for path in packaged_clips()}

pytestmark = pytest.mark.slow


def noise(frames: int, seed: int) -> np.ndarray:
    """A scene of its own colours that moves a little from frame to frame."""
    generator = np.random.default_rng(seed)
    still = np.kron(generator.integers(0, 255, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(still, i // 2, axis=1) for i in range(frames)])


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_the_real_street_has_cuts_where_its_pairs_change_the_scene(detector: str) -> None:
    shots = find_shots(REAL["bikes.mp4"], detector=detector)
    cuts = [round(start, 2) for start, _ in shots[1:]]
    assert cuts == [1.2, 3.04, 5.48, 7.48, 9.68]  # as seen on its contact sheet
    pairs = [cut for cut in read_cuts(MANIFEST) if cut.file == "bikes.mp4"]
    # Each pair begins with a shot, and both of its parts lie inside of it: there is no cut that pairs.json does not keep to.
    for pair in pairs:
        assert any(start - 0.01 <= pair.input[0] and pair.target[1] <= end + 0.01 for start, end in shots), pair.name
    assert {pair.input[0] for pair in pairs} == {0.0, *cuts[:-1]}
    assert shots[0][0] == 0.0 and shots[-1][1] == pytest.approx(10.0)
    assert all(end == start for (_, end), (start, _) in pairwise(shots))


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"])
def test_a_camera_or_figure_that_moves_makes_no_cut(name: str) -> None:
    assert len(find_shots(REAL[name])) == 1


def test_cuts_of_made_up_scenes_are_found_to_the_frame() -> None:
    lengths = [10, 3, 25, 12]
    video = encode_mp4(np.concatenate([noise(length, seed) for seed, length in enumerate(lengths)]), 10.0)
    edges = np.cumsum([0, *lengths]) / 10
    assert find_shots(video) == [pytest.approx(part) for part in pairwise(edges)]


def test_one_frame_is_one_shot_or_none() -> None:
    assert find_shots(encode_mp4(noise(1, 0), 10.0)) == []


def test_short_shots_are_lost_and_long_ones_divided(tmp_path: Path) -> None:
    shutil.copy(REAL["bikes.mp4"], tmp_path / "b.mp4")
    build = LocalBuild(tmp_path)
    video = Shots(build=build)(Video("b", "b.mp4"))
    assert [clip.index for clip in video.clips] == [0, 1, 2, 3, 4]
    assert [clip.start for clip in video.clips] == pytest.approx([0, 1.2, 3.04, 5.48, 7.48])
    assert [(lost.what, lost.reason) for lost in video.lost] == [("clip 5", "short")]
    assert "9.68–10.00 s lasts 0.32 s; min_s=1" in video.lost[0].told
    assert video.seconds == pytest.approx(10.0)

    divided = Shots(settings=Shots.Settings(max_s=1.0, min_s=0.5), build=build)(Video("b", "b.mp4"))
    assert all(0.5 <= clip.end - clip.start <= 1.0 for clip in divided.clips)
    assert sum(clip.end - clip.start for clip in divided.clips) == pytest.approx(9.68)
    assert [clip.index for clip in divided.clips] == list(range(len(divided.clips)))

    lost = Shots(settings=Shots.Settings(max_s=2.0, divide=False), build=build)(Video("b", "b.mp4"))
    assert [clip.index for clip in lost.clips] == [0, 1, 3]
    assert [(told.what, told.reason) for told in lost.lost] == [
        ("clip 2", "long"),
        ("clip 4", "long"),
        ("clip 5", "short"),
    ]


def test_a_broken_video_is_lost(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(REAL["bikes.mp4"].read_bytes()[:40_000])
    video = Shots(build=LocalBuild(tmp_path))(Video("b", "b.mp4"))
    assert [lost.reason for lost in video.lost] == ["unreadable"] and not video.clips


def test_parts_are_equal_and_within_the_limit() -> None:
    assert in_parts(1.0, 3.0, 2.0) == [(1.0, 3.0)]
    assert in_parts(0.0, 5.0, 2.0) == [pytest.approx((5 / 3 * i, 5 / 3 * (i + 1))) for i in range(3)]
