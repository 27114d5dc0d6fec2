"""kill -9 of a build's driver, at three points, and the same command again: the shards of an undisturbed build, nothing asked twice."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.yaml12 import dump_yaml
from tests.pipeline.data.build.stages import write_videos
from tests.scripted_server import ScriptedServer

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_alone"), pytest.mark.timeout(1200)]
HERE = "tests.pipeline.data.build.stages"
VIDEOS = 12
CONCURRENCY = 4


def command(folder: Path, out: Path, server: ScriptedServer) -> list[str]:
    stage = {"cpus": 0.1, "workers": 2}
    values = {
        "name": "killed",
        "sources": {"videos": str(folder / "videos")},
        "models": {
            "writer": {
                "model": "scripted",
                "base_url": server.base_url,
                "frames": 2,
                "frame_side": 32,
                "concurrency": CONCURRENCY,
            }
        },
        "stages": {
            "pieces": {"use": f"{HERE}:Pieces", **stage},
            "question": {"model": "writer", **stage},
            "review": {"model": "writer", **stage},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(values))
    return [sys.executable, "-m", "pipeline", "data", "build", str(path), "--out", str(out), "--split", "test=0.3"]


def digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*/*.parquet")
    }


def kill_when(due: Callable[[], bool], words: list[str], log: Path) -> None:
    """Start ``words`` and kill it with SIGKILL as soon as ``due``."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
        ends = time.monotonic() + 300
        while not due():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos", VIDEOS)
    with ScriptedServer(delay_s=0.15) as server:
        whole = tmp_path / "whole"
        subprocess.run(command(tmp_path, whole, server), check=True)
        expected, asks = digests(whole), dict(server.forms)
        assert len(expected) == 2
        server.seen.clear(), server.forms.clear()
        out = tmp_path / "killed"
        words = command(tmp_path, out, server)
        points = {
            "before the first answer": lambda: server.forms["wording"] >= 1,
            "between two stages": lambda: server.forms["verdict"] >= 3,
            "late": lambda: server.forms["verdict"] >= 16,
        }
        for name, due in points.items():
            kill_when(due, words, tmp_path / f"{name}.log")
            assert not (out / "train" / "_complete.json").exists(), name
        subprocess.run(words, check=True)
        assert digests(out) == expected
        again = sum(server.forms[form] - asks[form] for form in ("wording", "verdict"))
        assert 0 <= again <= CONCURRENCY * len(points)  # at most what was under way when it was killed
        assert not (out / "_build").exists()
