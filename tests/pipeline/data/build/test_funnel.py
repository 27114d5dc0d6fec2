"""What a build lost is counted by stage and reason, adds up, survives JSON, and can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import DataError
from pipeline.data.build.annotations import unannotated_videos
from pipeline.data.build.cutting import Cut
from pipeline.data.build.funnel import FUNNEL, Funnel, count, draw_funnel, read_funnel, write_funnel
from pipeline.data.build.gates import Gates
from pipeline.data.build.pairs import Neighbours
from pipeline.data.build.probing import Probe
from pipeline.data.build.shots import Shots
from pipeline.data.build.video import Clip, Lost, Pair, Video
from tests.pipeline.data.build.building import LocalBuild
from tests.pipeline.data.build.footage import REAL


def video(clips: int, pairs: int, *lost: tuple[str, str, str]) -> Video:
    return Video(
        "v",
        "v.mp4",
        clips=[Clip(i, i, i + 1.0) for i in range(clips)],
        pairs=[Pair(i, i + 1, "predictive") for i in range(pairs)],
        lost=[Lost(*told) for told in lost],
    )


VIDEOS = [
    video(0, 0, ("sources", "video", "missing")),
    video(3, 1, ("gates", "clip 1", "dark"), ("gates", "clip 4", "text"), ("review", "pair 0-2", "leaks")),
    video(2, 0, ("shots", "clip 2", "short"), ("gates", "clip 3", "dark"), ("neighbours", "pair 0-1", "far apart")),
    video(
        0, 0, ("gates", "clip 0", "dark"), ("exclude", "video", "evaluation"), ("splits", "video", "near two splits")
    ),
]
ORDER = ["sources", "exclude", "shots", "gates", "neighbours", "review"]


def test_each_stage_has_what_came_what_went_on_and_why_the_rest_did_not() -> None:
    funnel = count(VIDEOS, ORDER)
    assert funnel.made == {"video": 4, "clip": 10, "pair": 3}
    assert funnel.kept == {"video": 2, "clip": 5, "pair": 1}
    found = [(p.stage, p.what, p.entered, p.passed, p.lost) for p in funnel.passages]
    assert found == [
        ("sources", "video", 4, 3, {"missing": 1}),
        ("exclude", "video", 3, 2, {"evaluation": 1}),
        ("shots", "clip", 10, 9, {"short": 1}),
        ("gates", "clip", 9, 5, {"dark": 3, "text": 1}),
        ("neighbours", "pair", 3, 2, {"far apart": 1}),
        ("review", "pair", 2, 1, {"leaks": 1}),
    ]


LOSSES = st.tuples(st.sampled_from(ORDER), st.sampled_from(["clip 1", "pair 0-1#2", "video"]), st.sampled_from("ab"))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.lists(LOSSES, max_size=4)), max_size=6))
def test_what_came_is_what_went_on_and_what_was_lost(made: list[tuple[int, int, list[tuple[str, str, str]]]]) -> None:
    funnel = count([video(clips, pairs, *lost) for clips, pairs, lost in made], ORDER)
    for what in funnel.made:
        level = funnel.made[what]
        for passage in (passage for passage in funnel.passages if passage.what == what):
            assert passage.entered == level
            level = passage.passed
            assert passage.entered - passage.passed == sum(passage.lost.values()) > 0
        assert level == funnel.kept[what]
    assert funnel.made["video"] == len(made)


def test_it_survives_json_and_is_found_from_a_split(tmp_path: Path) -> None:
    assert read_funnel(tmp_path / "train") is None
    funnel = count(VIDEOS)
    write_funnel(funnel, tmp_path)
    assert read_funnel(tmp_path) == read_funnel(tmp_path / "train") == funnel
    (tmp_path / FUNNEL).write_text('{"format": 2}')
    with pytest.raises(DataError, match=r"_funnel\.json is no funnel of this version: format"):
        read_funnel(tmp_path)


def test_the_picture_has_a_bar_for_each_stage_as_long_as_its_share(tmp_path: Path) -> None:
    picture = np.asarray(
        Image.open(draw_funnel(count(VIDEOS, ORDER), tmp_path / "f.png", title="a build")).convert("RGB")
    )
    green = (picture == (0x2F, 0x9E, 0x6E)).all(axis=2)
    rows = np.flatnonzero(np.diff(green.any(axis=1).astype(int)) == 1)
    assert len(rows) == 3 + 6  # three kinds, six stages that lost something
    lengths = green[rows + 4].sum(axis=1)
    assert lengths / lengths[0] == pytest.approx([1, 3 / 4, 2 / 4, 1, 0.9, 0.5, 1, 2 / 3, 1 / 3], abs=0.02)
    empty = Funnel(made={}, kept={}, passages=[])
    assert draw_funnel(empty, tmp_path / "e.png").is_file()


@pytest.mark.slow
def test_the_street_goes_through_all_stages_before_the_models(tmp_path: Path) -> None:
    def built() -> Video:
        build = LocalBuild(tmp_path)
        stages = [
            Probe(build=build),
            Shots(build=build),
            Cut(settings=Cut.Settings(max_side=160), build=build),
            Gates(settings=Gates.Settings(min_s=2.0), build=build),
            Neighbours(settings=Neighbours.Settings(kind="predictive", max_skipped=0), build=build),
        ]
        (street,) = unannotated_videos(tmp_path)
        for stage in stages:
            street = stage(street)
        return street

    (tmp_path / "bikes.mp4").write_bytes(REAL["bikes.mp4"].read_bytes())
    street = built()
    assert [(pair.first, pair.second) for pair in street.pairs] == [(2, 3), (3, 4)]
    assert built() == street  # to the last byte of each clip, and to the last digit of each measure
    found = [(p.stage, p.entered, p.passed, p.lost) for p in count([street]).passages]
    # Six shots, one of a third of a second; the two first of the others are shorter than 2 s.
    assert found == [("shots", 6, 5, {"short": 1}), ("gates", 5, 3, {"short": 2})]
