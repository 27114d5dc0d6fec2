"""docs/build.md as it stands: real clips → steps and shots → a scripted endpoint → shards → a look → two steps of stage 1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.folder import open_dataset
from pipeline.data.real import packaged_clips
from tests.docs.pages import blocks
from tests.scripted_server import ScriptedServer

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_alone"), pytest.mark.timeout(1800)]
STEPS = {
    "bikes": [(0.0, 1.2), (1.2, 3.04), (3.04, 5.48)],
    "bigbuckbunny": [(0.0, 1.7), (1.7, 3.4), (3.4, 5.2)],
    "carphone_pristine": [(0.0, 2.0), (2.0, 4.0)],
}
KEY = "a-key-of-the-test"


def test_the_page_goes_from_videos_to_a_trained_step(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for clip in packaged_clips():
        shutil.copy(clip, tmp_path / "videos")
    lines = [
        {"video": name, "start": start, "end": end, "label": f"step {number}"}
        for name, steps in STEPS.items()
        for number, (start, end) in enumerate(steps)
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    commands = [words for block in blocks("docs/build.md") for words in block.commands]
    assert [words[:2] for words in commands] == [
        ["data", "build"],
        ["data", "build"],
        ["data", "inspect"],
        ["train", "real"],
    ]
    with ScriptedServer(key=KEY, models=("qwen",)) as server:
        # What the test changes: where the endpoint is, and a seed by which so few videos fall into both splits.
        changed = [f"models.{name}.base_url={server.base_url}" for name in ("writer", "reviewer")] + ["seed=2"]
        for words in commands:
            line = [sys.executable, "-m", "pipeline", *words, *(changed if words[1] == "build" else [])]
            ended = subprocess.run(
                line, cwd=tmp_path, env={**os.environ, "WRITER_KEY": KEY}, capture_output=True, text=True, timeout=900
            )
            print(ended.stdout[-6000:])
            assert ended.returncode == 0, f"{words}: {ended.stdout[-3000:]}{ended.stderr[-3000:]}"
            assert KEY not in ended.stdout + ended.stderr
    steps = open_dataset(tmp_path / "data" / "steps" / "train").rows
    assert (steps, open_dataset(tmp_path / "data" / "steps" / "test").rows) == (3, 2)
    assert open_dataset(tmp_path / "data" / "shots" / "train").rows == 8  # four pairs of shots, two questions each
    assert KEY.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
