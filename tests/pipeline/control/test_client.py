"""Finding a run and reading sizes: what a person typed wrong is one line, and needs no cluster."""

from __future__ import annotations

import dataclasses
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.control import board_name
from actors.pool.dispatch import Dispatcher
from actors.pool.settings import PoolSection, Watch
from pipeline.cli import app
from pipeline.control.client import ControlError, Scaled, open_run, parse_sizes
from pipeline.control.monitor import refusal
from pipeline.control.record import FILE, RunRecord, new_record
from pipeline.control.show import tables
from pipeline.control.snapshot import NO_ROOM, PoolView, Resize, RunView, pool_view


def pool(workers: int = 3) -> PoolView:
    """A pool of which one worker serves, one starts and the others wait for room."""
    core = Dispatcher("vdm", PoolSection(), Watch())
    core.resize(workers)
    core.publish(4)
    core.step(0.0)
    core.started("vdm-0", 1.0)
    core.step(1.0)
    core.loaded("vdm-0", 4, 2.0)
    core.placed("vdm-1")
    core.submit(3.0)
    return pool_view(core.stats(8.5), "1…4", [f"vdm-{slot}" for slot in range(2, workers)])


VIEW = RunView("toy", 1.7e9, (pool(),), "CPU 0.5", (Resize(1.7e9, "vdm", 1, 3, "vans scale"),))


def test_sizes_are_read_or_refused_with_the_right_form() -> None:
    assert parse_sizes(["vlm=3", "my-pool=12"]) == {"vlm": 3, "my-pool": 12}
    for texts, message in (
        (["vlm"], "'vlm' is not POOL=WORKERS; write for instance vlm=3 vdm=6"),
        (["vlm=many"], "'vlm=many' is not POOL=WORKERS"),
        (["vlm=1.5"], "'vlm=1.5' is not POOL=WORKERS"),
        (["vlm=0"], "vlm=0: a pool has at least 1 worker"),
        (["vlm=-2"], "vlm=-2: a pool has at least 1 worker"),
        (["vlm=1", "vlm=2"], "vlm=2: pool vlm is given twice"),
    ):
        with pytest.raises(ControlError, match=message):
            parse_sizes(texts)


def test_the_run_refuses_pools_that_it_does_not_have() -> None:
    assert refusal(["artist"], [], ["vlm", "vdm"]) == "no pool artist; the run's pools are vlm, vdm"
    assert refusal([], ["vlm=0"], ["vlm"]) == "vlm=0: a pool has at least 1 worker"


def test_view_travels_as_one_line_of_json() -> None:
    text = VIEW.to_json()
    assert "\n" not in text and RunView.from_json(text) == VIEW
    assert VIEW.pool("vdm").states() == {"ready": 1, "starting": 1, NO_ROOM: 1}
    assert (VIEW.pool("vdm").target, VIEW.pool("vdm").coming, VIEW.pool("vdm").no_room) == (3, 2, 1)


def test_status_shows_workers_by_state_and_who_waits_for_room() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tables(VIEW, age_s=42.0))
    text = console.export_text()
    for part in ("run toy", "1 of 3", "v4", "5.5 s", "1…4", "vdm-1", "starting", "vdm-2", "no room"):
        assert part in text
    assert "as of 42 s ago" in text and "1 worker(s) wait for room; free in the cluster: CPU 0.5" in text
    assert "vdm: 1 → 3 workers, vans scale" in text
    console.print(tables(dataclasses.replace(VIEW, every_s=20.0), age_s=42.0))
    assert "as of" not in console.export_text(), "two looks of a run that looks every 20 s"


def test_scaling_says_before_and_after_and_what_waits() -> None:
    assert list(Scaled({"vdm": 1}, {"vdm": 3}, VIEW).lines()) == [
        "vdm: 1 → 3 workers; 1 waits for room in the cluster (free: CPU 0.5). The others go on serving."
    ]
    roomy = dataclasses.replace(VIEW, pools=(pool(2),))
    assert list(Scaled({"vdm": 1}, {"vdm": 2}, roomy).lines()) == ["vdm: 1 → 2 workers; 1 starts"]
    assert list(Scaled({"vdm": 2}, {"vdm": 2}, roomy).lines()) == ["vdm: 2 workers, as before"]


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_runs_that_cannot_be_asked_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    running = dataclasses.replace(new_record("toy", free), state="running")
    assert running.board.startswith(board_name("toy", "")) and running.pid == os.getpid()
    cases: list[tuple[RunRecord, str]] = [
        (
            dataclasses.replace(running, state="ended", ended="2026-01-02T03:04:05+00:00"),
            "has ended: 2026-01-02T03:04:05",
        ),
        (dataclasses.replace(running, pid=gone_pid()), "its driver .pid \\d+. is gone"),
        (dataclasses.replace(running, state="starting"), "is starting its pools since"),
        (running, "run toy does not answer: No Ray cluster answers at 127.0.0.1"),
        (dataclasses.replace(running, pid=gone_pid(), host="elsewhere"), "does not answer"),
    ]
    for record, message in cases:
        record.write(tmp_path)
        assert RunRecord.read(tmp_path) == record
        with pytest.raises(ControlError, match=message) as caught, open_run(str(tmp_path)):
            pass
        assert "\n" not in str(caught.value)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ControlError, match=r"control\.json cannot be read"), open_run(str(tmp_path)):
        pass
    (tmp_path / FILE).unlink()
    with pytest.raises(ControlError, match=r"holds no control\.json"), open_run(str(tmp_path)):
        pass
    with pytest.raises(
        ControlError, match="no such run: nowhere is no run's folder; to ask by name give the cluster's"
    ):
        with open_run("nowhere"):
            pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "nowhere"], "no such run: nowhere"),
        (["scale", "nowhere", "vlm=3"], "no such run: nowhere"),
        (["scale", "nowhere", "vlm=0"], "vlm=0: a pool has at least 1 worker"),
        (["scale", "nowhere", "vlm:3"], "'vlm:3' is not POOL=WORKERS"),
        (["status", "toy", "--address", "http://head:8265"], "is a dashboard's address"),
    ],
)
def test_command_line_prints_one_line_and_exits_with_2(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert result.stderr.count("\n") == 1
