"""A source video is opened once: what it is, how long, and whether its steps lie inside of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from pipeline.data.build.probing import Probe
from pipeline.data.build.video import Clip, Video
from pipeline.data.real import packaged_clips
from tests.pipeline.data.build.building import LocalBuild


def test_steps_outside_of_their_video_are_lost(tmp_path: Path) -> None:
    bikes = next(path for path in packaged_clips() if path.name == "bikes.mp4")  # 10 s
    shutil.copy(bikes, tmp_path / "bikes.mp4")
    steps = [(0.0, 2.0), (8.0, 10.5), (8.0, 12.0), (10.0, 10.2)]
    clips = [Clip(index, start, end, "x") for index, (start, end) in enumerate(steps)]
    video = Probe(build=LocalBuild(tmp_path))(Video("bikes", "bikes.mp4", clips=clips))
    assert video.seconds == 10.0
    assert video.digest == hashlib.sha256(bikes.read_bytes()).hexdigest()
    assert [(clip.index, clip.end) for clip in video.clips] == [(0, 2.0), (1, 10.0)]
    assert [(lost.what, lost.reason) for lost in video.lost] == [
        ("clip 2", "outside its video"),
        ("clip 3", "outside its video"),
    ]
    assert "8–12 s, and the video lasts 10.00 s" in video.lost[0].told


def test_a_video_that_cannot_be_opened_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"no video")
    probe = Probe(build=LocalBuild(tmp_path))
    video = probe(Video("x", "x.mp4", clips=[Clip(0, 0.0, 1.0)]))
    assert not video.clips and [lost.reason for lost in video.lost] == ["unreadable"]
    gone = probe(Video("y", "y.mp4"))
    assert "no such clip" in gone.lost[0].told
    out = probe(Video("z", "../x.mp4"))
    assert "must be a path inside" in out.lost[0].told
