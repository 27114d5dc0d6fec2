"""Annotations of COIN, YouCook2 and JSON lines become videos with clips; what cannot be right is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DataError
from pipeline.data.build.annotations import annotated_videos, missing, unannotated_videos

COIN = {
    "database": {
        "BBBBBBBBBBB": {
            "recipe_type": 131,
            "subset": "training",
            "duration": 60.0,
            "class": "MakeTea",
            "video_url": "not looked at",
            "annotation": [
                {"id": "2", "label": "pour  water", "segment": [20.0, 31.5]},
                {"id": "1", "label": "boil water", "segment": [3, 12.0]},
            ],
        },
        "aa-a_aaaaaa": {"recipe_type": 7, "annotation": [{"id": "9", "label": "cut tape", "segment": [1.0, 4.0]}]},
    }
}
YOUCOOK2 = {
    "database": {
        "cook0000001": {
            "recipe_type": "113",
            "duration": 100.5,
            "annotations": [{"id": 0, "sentence": "whisk the eggs", "segment": [10, 20]}],
        }
    }
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "BBBBBBBBBBB.mp4",
        "deep/er/aa-a_aaaaaa.webm",
        "validation/113/cook0000001.mkv",
        "notes.txt",
        ".x.mp4",
    ):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not opened here")
    return tmp_path / "videos"


def write(path: Path, value: Any) -> Path:
    lines = value if isinstance(value, list) else [value]
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def test_coin_and_youcook2_are_known_by_their_structure(folder: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.json", COIN), write(tmp_path / "b.json", YOUCOOK2)]
    first, second, third = annotated_videos(files, folder)
    assert (first.name, first.path, first.topic, first.order) == ("BBBBBBBBBBB", "BBBBBBBBBBB.mp4", "131", 0)
    assert [(c.index, c.start, c.end, c.label) for c in first.clips] == [
        (0, 3.0, 12.0, "boil water"),
        (1, 20.0, 31.5, "pour water"),
    ]
    assert (second.path, second.topic, second.order) == ("deep/er/aa-a_aaaaaa.webm", "7", 1)
    assert (third.path, third.topic, third.order) == ("validation/113/cook0000001.mkv", "113", 2)
    assert third.clips[0].label == "whisk the eggs"
    assert not first.lost and not third.lost


def test_json_lines_may_name_paths_and_come_in_any_order(folder: Path, tmp_path: Path) -> None:
    lines = [
        {"video": "deep/er/aa-a_aaaaaa.webm", "start": 5.0, "end": 6, "label": "later"},
        {"video": "BBBBBBBBBBB", "start": 0.5, "end": 1.0, "label": "other"},
        "",
        {"video": "deep/er/aa-a_aaaaaa.webm", "start": 1.0, "end": 2.0, "label": "earlier"},
    ]
    first, second = annotated_videos([write(tmp_path / "a.jsonl", lines)], folder)
    assert [clip.label for clip in first.clips] == ["earlier", "later"]
    assert second.path == "BBBBBBBBBBB.mp4"


def test_steps_that_cannot_be_right_are_lost_and_keep_their_number(folder: Path, tmp_path: Path) -> None:
    steps = [
        ("fine", 1.0, 2.0),
        ("backwards", 9.0, 4.0),
        ("empty", 10.0, 10.0),
        ("late", 61.0, 70.0),
        ("fine too", 50.0, 59.0),
    ]
    coin = {
        "database": {
            "BBBBBBBBBBB": {"duration": 60.0, "annotation": [{"label": n, "segment": [a, b]} for n, a, b in steps]}
        }
    }
    (video,) = annotated_videos([write(tmp_path / "a.json", coin)], folder)
    assert [(clip.index, clip.label) for clip in video.clips] == [(0, "fine"), (3, "fine too")]
    assert [(lost.what, lost.reason) for lost in video.lost] == [(f"clip {i}", "bad times") for i in (1, 2, 4)]
    assert "ends at 4 s, and begins at 9 s" in video.lost[0].told
    assert "begins at 61 s of a video that lasts 60 s" in video.lost[2].told


def test_missing_videos_are_counted_and_the_first_is_named(folder: Path, tmp_path: Path) -> None:
    names = ["gone", "BBBBBBBBBBB", "gone too", "../outside.mp4"]
    lines = [{"video": name, "start": 0, "end": 1, "label": "x"} for name in names]
    videos = list(annotated_videos([write(tmp_path / "a.jsonl", lines)], folder))
    assert [bool(video.path) for video in videos] == [False, True, False, False]
    assert missing(videos).startswith("3 videos cannot be read; the first: there is no video 'gone'")
    with pytest.raises(DataError, match="none of the 1 videos is below"):
        annotated_videos([write(tmp_path / "b.jsonl", [lines[0]])], folder)


def test_an_id_that_could_be_two_files_and_a_file_with_two_ids_are_lost(folder: Path, tmp_path: Path) -> None:
    (folder / "deep/BBBBBBBBBBB.avi").write_bytes(b"x")
    names = ["BBBBBBBBBBB", "deep/BBBBBBBBBBB", "deep/BBBBBBBBBBB.avi"]
    lines = [{"video": name, "start": 0, "end": 1, "label": "x"} for name in names]
    first, second, third = annotated_videos([write(tmp_path / "a.jsonl", lines)], folder)
    assert "could be any of 'BBBBBBBBBBB.mp4', 'deep/BBBBBBBBBBB.avi'" in first.lost[0].told
    assert second.path == "deep/BBBBBBBBBBB.avi"
    assert "are the same file" in third.lost[0].told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds a list of 2, which is no known format"),
        ('{"database": {}}', "holds an object with the keys 'database', which is no known"),
        ('{"database": {"v": {"segments": []}}}', "video 'v' is an object with the keys 'segments', which is no known"),
        ('{"database": {"v": {"annotation": [{"label": "x", "segment": [1]}]}}}', "video 'v': annotation.0.segment.1"),
        ('{"database": {"v": {"annotation": []}, "v": {"annotation": []}}}', "'v' stands twice"),
        ("start,end,label\n1,2,x", "is no JSON, nor JSON lines"),
        ('{"video": "v", "from": 1}', ":1: start: Field required. Known annotations: COIN"),
        ('{"video": "v", "start": 1, "end": NaN, "label": "x"}', ":1: end"),
        ('{"video": "v", "start": 1, "end": 2, "label": "x"}\nnonsense', ":2: not a JSON object"),
        ("", "is no JSON"),
    ],
)
def test_an_unknown_format_is_told_with_what_was_found(
    folder: Path, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        annotated_videos([path], folder)
    assert message in str(error.value)


def test_a_video_in_two_files_is_refused(folder: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.json", COIN), write(tmp_path / "b.json", COIN)]
    with pytest.raises(DataError, match=r"'BBBBBBBBBBB' is annotated twice, in a\.json and b\.json"):
        annotated_videos(files, folder)


def test_a_folder_without_annotations_gives_all_of_its_videos(folder: Path, tmp_path: Path) -> None:
    (folder / "BBBBBBBBBBB.mov").write_bytes(b"x")
    videos = list(unannotated_videos(folder))
    deep = ["deep/er/aa-a_aaaaaa", "validation/113/cook0000001"]
    assert [video.name for video in videos] == ["BBBBBBBBBBB.mov", "BBBBBBBBBBB.mp4", *deep]
    assert [video.order for video in videos] == [0, 1, 2, 3]
    assert not any(video.clips or video.lost for video in videos)
    listed = write(tmp_path / "list.txt", ["cook0000001", "BBBBBBBBBBB.mp4", "gone"])
    assert [video.path for video in unannotated_videos(folder, listed)] == [
        "validation/113/cook0000001.mkv",
        "BBBBBBBBBBB.mp4",
        "",
    ]
    with pytest.raises(DataError, match="names the video 'a' twice"):
        unannotated_videos(folder, write(tmp_path / "twice.txt", ["a", "b", "a"]))


def test_a_folder_without_videos_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no video in"):
        unannotated_videos(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        unannotated_videos(tmp_path / "gone")
