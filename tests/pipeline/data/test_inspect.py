"""`vans data inspect` of a built set: shares, reasoning on the sheet, and where its build lost what."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data import inspect as room
from pipeline.data.build.funnel import count, write_funnel
from pipeline.data.build.video import Clip, Lost, Video
from pipeline.data.importers.clips import ClipSpec, copy_clip
from pipeline.data.inspect import inspect, print_report
from pipeline.data.real import packaged_clips
from pipeline.data.schema import Row, ShardWriter
from rewards.format import DEFAULT


def built(folder: Path, thought: str) -> None:
    """Three rows of real clips as a build writes them, one of which states nothing."""
    bikes = next(path for path in packaged_clips() if path.name == "bikes.mp4")
    clips = [copy_clip(bikes, start, end, ClipSpec(max_side=160)) for start, end in ((1.2, 1.92), (1.92, 3.04))]
    metas = [{"language": "en", "topic": "131", "video": "a"}, {"language": "zh", "topic": "131", "video": "b"}, {}]
    answers = [DEFAULT.write(thought, "A taxi drives in."), "[Think]own tags[/Think][Ans]A taxi drives in.[/Ans]", None]
    with ShardWriter(folder) as writer:
        for number, (meta, answer) in enumerate(zip(metas, answers)):
            question = "What if the light turns green?"
            texts = (f"row {number}", "predictive", question, "A taxi drives in.")
            writer.write(Row(*texts, *clips, meta=json.dumps(meta), answer=answer))


def told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    screen = io.StringIO()
    monkeypatch.setattr(room.terminal, "console", lambda: Console(file=screen, width=200))
    print_report(inspect(folder))
    return screen.getvalue()


def test_shares_and_reasoning_of_a_built_set_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "train", "The street is crowded, so a car may follow the man.")
    text = told(tmp_path / "train", monkeypatch)
    assert "3 predictive (100%)" in text
    assert "en 33%, zh 33%, not stated 33%" in text
    assert "131 67%, not stated 33%" in text
    assert "in 2 rows" in text
    assert "funnel" not in text and not list(tmp_path.rglob("*funnel*"))


def test_the_sheet_has_room_for_the_reasoning(tmp_path: Path) -> None:
    from PIL import Image

    heights = []
    for name, thought in (("short", "So."), ("long", "The street is crowded, so a car may follow the man. " * 6)):
        built(tmp_path / name, thought)
        sheet = inspect(tmp_path / name, rows=1).sheet
        assert sheet is not None
        heights.append(Image.open(sheet).height)
    assert heights[1] > heights[0] + 60


def test_a_funnel_beside_the_splits_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path / "train", "So.")
    lost = [Lost("gates", "clip 3", "dark"), Lost("gates", "clip 4", "text")]
    write_funnel(count([Video("a", "a.mp4", clips=[Clip(0, 0.0, 1.0)], lost=lost)]), tmp_path)
    text = told(tmp_path / "train", monkeypatch)
    assert "1 of 1 videos, 1 of 3 clips" in text
    assert (tmp_path / "train" / "_funnel.png").read_bytes().startswith(b"\x89PNG")
    inspect(tmp_path / "train", sheet=tmp_path / "look.png")
    assert (tmp_path / "look_funnel.png").is_file()
