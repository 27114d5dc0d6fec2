"""What ``make docs`` writes of the program and of the toy world is what they are now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from pipeline.data.toy.picture import toy_picture
from pipeline.data.video import decode_video
from tests.docs.pages import ROOT

LARGEST = 200 * 1024
"""Bytes of a clip on the first page."""


def test_the_commands_page_is_what_the_program_says(tmp_path: Path) -> None:
    command = ["-m", "typer", "pipeline.cli", "utils", "docs", "--name", "vans", "--title", "Commands", "--output"]
    subprocess.run([sys.executable, *command, str(tmp_path / "commands.md")], cwd=ROOT, check=True, capture_output=True)
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == (tmp_path / "commands.md").read_text(encoding="utf-8"), "run: make docs"


def test_the_first_pages_clip_is_the_toy_world_as_it_is() -> None:
    file = (ROOT / "docs" / "images" / "toy_world.mp4").read_bytes()
    frames = toy_picture()
    shown = decode_video(file, *frames.shape[:3])
    assert len(file) < LARGEST
    assert np.abs(shown.astype(float) - frames).mean() < 3, "run: make docs"  # grey levels: what the codec loses
