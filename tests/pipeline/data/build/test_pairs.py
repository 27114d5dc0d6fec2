"""Neighbouring clips become pairs; what was lost between them is told, within a bound."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.build.pairs import Neighbours
from pipeline.data.build.video import Clip, Video
from tests.pipeline.data.build.building import LocalBuild


def paired(video: Video, kind: str = "procedural", **settings) -> Video:  # type: ignore[no-untyped-def]
    return Neighbours(settings=Neighbours.Settings(kind=kind, **settings), build=LocalBuild(Path()))(video)


def steps(*kept: int, of: int = 6) -> Video:
    """A video of ``of`` steps of ten seconds, of which those ``kept`` were not lost."""
    clips = [Clip(i, 10.0 * i, 10.0 * i + 9, f"step {i}") for i in kept]
    return Video("v", "v.mp4", steps=[f"step {i}" for i in range(of)], clips=clips)


def test_steps_that_were_lost_between_two_are_told() -> None:
    video = paired(steps(0, 1, 4))
    assert [(pair.first, pair.second, pair.skipped) for pair in video.pairs] == [
        (0, 1, []),
        (1, 4, ["step 2", "step 3"]),
    ]
    assert {pair.kind for pair in video.pairs} == {"procedural"} and not video.lost


def test_too_many_lost_steps_make_no_pair() -> None:
    video = paired(steps(0, 4, 5), max_skipped=2)
    assert [(pair.first, pair.second) for pair in video.pairs] == [(4, 5)]
    assert [(lost.what, lost.reason) for lost in video.lost] == [("pair 0-4", "too many skipped")]
    assert "3 clips between the two were lost; max_skipped=2" in video.lost[0].told


def test_steps_that_overlap_or_lie_far_apart_make_no_pair() -> None:
    clips = [Clip(0, 0.0, 10.0, "a"), Clip(1, 5.0, 12.0, "b"), Clip(2, 11.8, 15.0, "c"), Clip(3, 90.0, 95.0, "d")]
    video = paired(Video("v", "v.mp4", clips=clips), max_gap_s=30.0)
    assert [(pair.first, pair.second) for pair in video.pairs] == [(1, 2)]  # 0.2 s of overlap is how people mark
    assert [lost.reason for lost in video.lost] == ["overlap", "far apart"]


def test_several_questions_of_a_pair_are_told_apart_by_number() -> None:
    shots = Video("v", "v.mp4", clips=[Clip(i, float(i), i + 1.0) for i in range(3)])
    video = paired(shots, "predictive", questions=2)
    assert [(pair.first, pair.second, pair.number) for pair in video.pairs] == [
        (0, 1, 0),
        (0, 1, 1),
        (1, 2, 0),
        (1, 2, 1),
    ]
    video.pairs[0].skipped.append("x")
    assert video.pairs[1].skipped == []


def test_fewer_than_two_clips_make_no_pair() -> None:
    assert paired(steps(3)).pairs == [] and paired(steps()).pairs == []


@given(st.sets(st.integers(0, 9)), st.integers(0, 9))
def test_each_kept_clip_is_paired_with_the_next_or_the_reason_is_told(kept: set[int], most: int) -> None:
    video = paired(steps(*sorted(kept), of=10), max_skipped=most)
    assert len(video.pairs) + len(video.lost) == max(0, len(kept) - 1)
    for pair in video.pairs:
        assert pair.skipped == [f"step {i}" for i in range(pair.first + 1, pair.second)] and len(pair.skipped) <= most
