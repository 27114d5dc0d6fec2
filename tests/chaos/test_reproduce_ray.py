"""``vans reproduce`` killed in the middle of a row: the same command keeps the finished rows and finishes the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]


def start(out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "reproduce",
        "--quick",
        "--seeds",
        "1",
        "--out",
        str(out),
        "--row",
        "joint",
    ]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=dict(os.environ))


@pytest.mark.timeout(1500)
def test_the_same_command_finishes_what_was_killed(ray_alone: None, tmp_path: Path) -> None:
    out, log = tmp_path / "table", tmp_path / "log"
    first = start(out, log)
    finished, begun = out / "seed0" / "stage1" / "row.json", out / "seed0" / "joint" / "config.yaml"
    deadline = time.monotonic() + 600
    while not begun.is_file():
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    assert finished.is_file(), "rows run in the order in which they need each other"
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=30)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    kept = finished.read_bytes(), finished.stat().st_mtime_ns
    assert not (out / "seed0" / "joint" / "row.json").exists()

    again = start(out, log)
    assert again.wait(timeout=600) == 0, log.read_text()
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == kept
    table = json.loads((out / "test" / "table.json").read_text(encoding="utf-8"))
    assert {"sft", "stage1", "joint"} <= table["rows"].keys(), table.keys()
    report = (out / "test" / "table.md").read_text(encoding="utf-8")
    assert "one seed only" in report and "Joint-GRPO" in report
    for name in ("curves.png", "contact_sheet.png"):
        assert (out / "test" / name).stat().st_size > 1000
