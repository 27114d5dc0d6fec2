"""No video of an evaluation set goes on: by its name, and by what it shows in another codec, size and cut."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from cluster.errors import DataError
from pipeline.data.build.evaluation import Evaluation, Exclude, video_hashes
from pipeline.data.build.video import Clip, Video
from pipeline.data.schema import Row, ShardWriter
from tests.pipeline.data.build.building import LocalBuild
from tests.pipeline.data.build.footage import CODECS, REAL, SPANS, coded_anew

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in SPANS:
        shutil.copy(REAL[name], folder / name)
    return folder


def written(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["output_video_path", "input_video_path", "ENG_Instruction", "ENG_GT_Caption"])
        writer.writerows([second, first, "What next?", "#NAME?"] for first, second in rows)
    return str(path)


@pytest.mark.parametrize(("codec", "size", "options"), CODECS, ids=[codec for codec, *_ in CODECS])
@pytest.mark.parametrize("name", SPANS)
def test_a_clip_coded_anew_cut_elsewhere_and_resized_is_caught_and_no_other_video(
    name: str, codec: str, size: tuple[int, int], options: dict[str, str], sources: Path, tmp_path: Path
) -> None:
    (tmp_path / "q.mkv").write_bytes(coded_anew(name, codec, size, options))
    table = written(tmp_path / "eval.csv", [("q.mkv", "q.mkv")])
    stage = Exclude(settings=Exclude.Settings(sets=[table], clips=str(tmp_path)), build=LocalBuild(sources))
    stage.setup()
    for other in SPANS:
        video = stage(Video(f"clip of {other}", other, clips=[Clip(0, 0.0, 1.0)]))
        if other == name:
            assert [(lost.what, lost.reason) for lost in video.lost] == [("video", "evaluation")]
            assert "it shows the evaluation clip 'q.mkv'" in video.lost[0].told and not video.clips
        else:
            assert not video.lost and len(video.clips) == 1


def test_shards_are_an_evaluation_set_by_source_and_by_what_they_show(sources: Path, tmp_path: Path) -> None:
    clip = coded_anew("bikes.mp4", *CODECS[1])
    with ShardWriter(tmp_path / "set") as writer:
        meta = json.dumps({"video": "somewhere/abcdefghijk"})
        writer.write(Row("a/0-1", "predictive", "What?", "This.", clip, clip, meta=meta))
    stage = Exclude(settings=Exclude.Settings(sets=[str(tmp_path / "set")]), build=LocalBuild(sources))
    assert stage(Video("x", "bikes.mp4")).lost[0].reason == "evaluation"
    assert not stage(Video("y", "carphone_pristine.mp4")).lost
    named = stage(Video("abcdefghijk", "carphone_pristine.mp4")).lost
    assert "is named by 'abcdefghijk'" in named[0].told


def test_a_source_is_known_by_its_id_in_the_names_of_clips(tmp_path: Path) -> None:
    table = written(tmp_path / "e.csv", [("clips/abcDEF-1_xy_3.mp4", "b/zz9/4.mp4"), ("p12.mp4", "b\\tea.mp4")])
    evaluation = Evaluation([table])
    for name in ("abcDEF-1_xy", "other/abcDEF-1_xy", "zz9", "p12", "tea", "clips/abcDEF-1_xy_3.mp4"):
        assert evaluation.named(name), name
    for name in ("abcDEF-1_x", "bcDEF-1_xy", "p1", "DEF", "zz", "2"):  # short ids count only as a whole part
        assert not evaluation.named(name), name
    assert evaluation.shown([1, 2, 3]) == ""


def test_a_set_that_cannot_be_kept_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("name,question\na,b\n")
    with pytest.raises(DataError, match="has no column that ends in _path"):
        Evaluation([str(tmp_path / "e.csv")])
    table = written(tmp_path / "gone.csv", [("gone.mp4", "gone.mp4")])
    with pytest.raises(DataError, match=r"no such clip: 'gone\.mp4'"):
        Evaluation([table], tmp_path)
    with pytest.raises(DataError):
        Evaluation([str(tmp_path / "no folder")])


def test_hashes_are_spread_evenly_and_a_broken_video_costs_itself(sources: Path, tmp_path: Path) -> None:
    assert len(video_hashes(REAL["bikes.mp4"])) == pytest.approx(80, abs=3)
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    table = written(tmp_path / "e.csv", [("a.mp4", "b.mp4")])
    stage = Exclude(settings=Exclude.Settings(sets=[table]), build=LocalBuild(tmp_path))
    assert stage(Video("x", "x.mp4")).lost[0].reason == "unreadable"
