"""What must pass the gates passes, and what must not does not: real clips, and the same with faults drawn in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.build.cutting import Cut, clip_frames
from pipeline.data.build.gates import RULES, Gates, first_refusal
from pipeline.data.build.measures import take
from pipeline.data.build.video import Clip, Video
from pipeline.data.importers.cut import read_cuts
from pipeline.data.real import MANIFEST
from pipeline.data.video import encode_mp4
from tests.pipeline.data.build.building import LocalBuild
from tests.pipeline.data.build.footage import FPS, REAL, REFUSED, SCENES, logo, looked_at, scene

pytestmark = pytest.mark.slow


def judged(frames: np.ndarray, settings: Gates.Settings | None = None) -> tuple[str, str]:
    """The reason and the sentence of the first gate that refuses ``frames``."""
    refused = first_refusal(take(frames, FPS), settings or Gates.Settings())
    return ("", "") if refused is None else (refused[0].reason, refused[1])


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("fault", REFUSED)
def test_footage_with_a_fault_is_refused_for_it(name: str, fault: str) -> None:
    draw, reasons = REFUSED[fault]
    reason, told = judged(looked_at(draw(scene(name))))
    assert reason in reasons, told
    assert "=" in told and any(character.isdigit() for character in told)  # the number and its threshold


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("draw", [lambda frames: frames, logo], ids=["as it is", "with a station's logo"])
def test_real_footage_passes(name: str, draw) -> None:  # type: ignore[no-untyped-def]
    assert judged(looked_at(draw(scene(name)))) == ("", "")


def test_the_pairs_that_people_cut_from_real_clips_pass_all_gates(tmp_path: Path) -> None:
    build = LocalBuild(tmp_path)
    for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"):
        shutil.copy(REAL[name], tmp_path / name)
        parts = [part for cut in read_cuts(MANIFEST) if cut.file == name for part in (cut.input, cut.target)]
        video = Video(name, name, clips=[Clip(i, *part) for i, part in enumerate(parts)])
        done = Gates(settings=Gates.Settings(min_s=0.4), build=build)(video)
        assert [lost.told for lost in done.lost] == []
        assert len(done.clips) == len(parts)
        assert all(clip.hashes and {rule.measure for rule in RULES[:-2]} <= set(clip.measures) for clip in done.clips)


def test_a_threshold_of_null_opens_its_gate() -> None:
    dark = looked_at(REFUSED["darkened"][0](scene("bikes.mp4")))
    assert judged(dark, Gates.Settings(min_brightness=None))[0] == "border"
    assert judged(dark, Gates.Settings(min_brightness=None, max_border=None, min_motion=None)) == ("", "")
    assert {rule.setting for rule in RULES} | {"clip"} == set(Gates.Settings.model_fields)


def test_a_clip_like_the_one_before_is_lost_and_is_no_neighbour(tmp_path: Path) -> None:
    frames = scene("bikes.mp4", 180)
    other = scene("carphone_pristine.mp4", 180)[: len(frames), :, : frames.shape[2]]
    other = np.pad(other, ((0, 0), (0, 0), (0, frames.shape[2] - other.shape[2]), (0, 0)), mode="symmetric")
    half = len(frames)
    (tmp_path / "x.mp4").write_bytes(
        encode_mp4(np.concatenate([frames, frames, other, frames]), FPS, near_lossless=False)
    )
    video = Video("x", "x.mp4", clips=[Clip(i, i * half / FPS, (i + 1) * half / FPS) for i in range(4)])
    done = Gates(settings=Gates.Settings(max_inset=None), build=LocalBuild(tmp_path))(video)
    assert [clip.index for clip in done.clips] == [0, 2, 3]  # 3 shows what 0 does, but 2 lies between
    assert [(lost.what, lost.reason) for lost in done.lost] == [("clip 1", "near-duplicate")]
    assert "max_likeness=0.85" in done.lost[0].told


def test_clip_compares_neighbours_where_a_folder_is_given(tmp_path: Path, tiny_clip_dir: Path) -> None:
    shutil.copy(REAL["bikes.mp4"], tmp_path / "b.mp4")
    video = Video("b", "b.mp4", clips=[Clip(0, 1.2, 2.2), Clip(1, 1.3, 2.3), Clip(2, 5.6, 6.6)])
    settings = Gates.Settings(clip=str(tiny_clip_dir), max_likeness=None, max_clip_likeness=None)
    gates = Gates(settings=settings, build=LocalBuild(tmp_path))
    gates.setup()
    alike, apart = (clip.measures["clip_likeness"] for clip in gates(video).clips[1:])
    assert apart < alike <= 1.0
    strict = Gates(
        settings=settings.model_copy(update={"max_clip_likeness": (alike + apart) / 2}), build=LocalBuild(tmp_path)
    )
    strict.setup()
    again = strict(Video("b", "b.mp4", clips=[Clip(0, 1.2, 2.2), Clip(1, 1.3, 2.3), Clip(2, 5.6, 6.6)]))
    assert [clip.index for clip in again.clips] == [0, 2] and "CLIP's cosine" in again.lost[0].told


def test_a_clip_that_was_cut_is_measured_then_and_not_decoded_again(tmp_path: Path) -> None:
    build = LocalBuild(tmp_path)
    shutil.copy(REAL["bikes.mp4"], tmp_path / "b.mp4")
    spans = [(1.2, 3.0), (3.04, 5.4), (5.6, 7.4)]
    uncut = Gates(build=build)(Video("b", "b.mp4", clips=[Clip(i, *span) for i, span in enumerate(spans)]))
    cut = Cut(build=build)(Video("b", "b.mp4", clips=[Clip(i, *span) for i, span in enumerate(spans)]))
    build.store.held.clear()
    (tmp_path / "b.mp4").unlink()
    done = Gates(build=build)(cut)
    assert len(uncut.clips) == len(done.clips) == 3
    for one, other in zip(uncut.clips, done.clips):
        assert other.measures == pytest.approx(one.measures, rel=0.1, abs=0.02)


def test_a_clip_that_cannot_be_read_costs_itself_alone(tmp_path: Path) -> None:
    shutil.copy(REAL["bikes.mp4"], tmp_path / "b.mp4")
    video = Video("b", "b.mp4", clips=[Clip(0, 1.2, 2.2), Clip(1, 50.0, 51.0), Clip(2, 5.6, 6.6)])
    done = Gates(build=LocalBuild(tmp_path))(video)
    assert [clip.index for clip in done.clips] == [0, 2]
    assert [lost.reason for lost in done.lost] == ["unreadable"]


def test_frames_are_of_the_whole_picture_and_as_many_as_are_asked(tmp_path: Path) -> None:
    shutil.copy(REAL["bikes.mp4"], tmp_path / "b.mp4")
    frames, fps = clip_frames(Video("b", "b.mp4"), Clip(0, 1.2, 3.2), LocalBuild(tmp_path), fps=8.0, side=160)
    assert frames.shape == (16, 68, 160, 3)  # the video is 640x272
    assert fps == pytest.approx(8.0, rel=0.05)
    few, _ = clip_frames(Video("b", "b.mp4"), Clip(0, 1.2, 3.2), LocalBuild(tmp_path), fps=8.0, most=5)
    assert len(few) == 5
