"""``vans reproduce`` stopped by Ctrl-C and killed in the middle of rows: the same command keeps what is finished and goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.processes import command, kill, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]


@pytest.mark.timeout(2000)
def test_the_same_command_finishes_what_was_stopped_and_killed(ray_alone: None, tmp_path: Path) -> None:
    out, log = tmp_path / "table", tmp_path / "log"
    arguments = ["reproduce", "--quick", "--seeds", "1", "--out", str(out), "--row", "joint"]
    finished, begun = out / "seed0" / "stage1" / "row.json", out / "seed0" / "joint" / "config.yaml"
    with command(log, *arguments) as stopped:
        until((out / "seed0" / "stage1" / "config.yaml").is_file, stopped, log)
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(120) == 128 + signal.SIGINT, log.read_text()[-8000:]
    assert "stopped by SIGINT; the same command continues" in " ".join(log.read_text().split())
    assert "Traceback" not in log.read_text() and not finished.exists()

    with command(log, *arguments) as killed:
        until(begun.is_file, killed, log)
        assert finished.is_file(), "rows run in the order in which they need each other"
        kill(killed)
    kept = finished.read_bytes(), finished.stat().st_mtime_ns
    assert not (out / "seed0" / "joint" / "row.json").exists()

    with command(log, *arguments) as again:
        assert again.wait(timeout=600) == 0, log.read_text()[-8000:]
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == kept
    table = json.loads((out / "test" / "table.json").read_text(encoding="utf-8"))
    assert {"sft", "stage1", "joint"} <= table["rows"].keys(), table.keys()
    assert "Joint-GRPO" in (out / "test" / "table.md").read_text(encoding="utf-8")
    # So few questions may point either way; that something holds, one seed never says.
    assert {ordering["verdict"] for ordering in table["orderings"]} <= {
        "one seed only",
        "does not hold",
        "not measured",
    }
    for name in ("curves.png", "contact_sheet.png"):
        assert (out / "test" / name).stat().st_size > 1000
