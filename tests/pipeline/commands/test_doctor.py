"""The doctor reports what is broken with a cure, and one broken library does not hide the others."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipeline import cli
from pipeline.commands import doctor
from pipeline.commands.doctor import PROBES, Probe, print_report, run_doctor

pytestmark = pytest.mark.slow

REAL = tuple(probe for probe in PROBES if probe.name in ("torchvision", "video (PyAV)"))


def report(checks) -> tuple[bool, str]:
    screen = io.StringIO()
    fine = print_report(checks, Console(file=screen, width=200))
    return fine, screen.getvalue()


def test_this_environment_is_healthy(tmp_path: Path) -> None:
    checks = run_doctor(tmp_path / "runs", REAL)
    fine, text = report(checks)
    assert fine, text
    assert {check.name for check in checks} >= {"python", "torchvision", "cores", "memory", "GPU", "runs folder"}
    assert not (tmp_path / "runs").exists()  # looking leaves no trace


def test_broken_crashing_and_hanging_libraries_are_told_apart_from_working_ones(tmp_path: Path) -> None:
    probes = (
        Probe("fine", "print('1.2.3')", "nothing"),
        Probe("missing", "import no_such_library", "install it"),
        Probe("crashing", "import os; os.kill(os.getpid(), 11)", "reinstall [it]"),
        Probe("hanging", "import time; time.sleep(60)", "look why", timeout_s=1.0),
    )
    started = time.monotonic()
    checks = run_doctor(tmp_path, probes)
    assert time.monotonic() - started < 30
    found = {check.name: check for check in checks}
    assert (found["fine"].status, found["fine"].detail) == ("works", "1.2.3")
    assert found["missing"].detail == "ModuleNotFoundError: No module named 'no_such_library'"
    assert "status -11" in found["crashing"].detail
    assert found["hanging"].detail == "no answer within 1 s"
    fine, text = report(checks)
    assert not fine
    assert "broken: missing, crashing, hanging" in text
    assert "cure: install it" in text and "cure: reinstall [it]" in text


def test_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = run_doctor(tmp_path / "file" / "runs", ())[-1]
    assert folder.status == "broken" and "--out" in folder.cure


def test_how_many_files_may_be_open_is_told_with_a_cure_where_it_is_few(tmp_path: Path) -> None:
    script = (
        "import resource; from pathlib import Path; from pipeline.commands.doctor import run_doctor\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        f"print([c for c in run_doctor(Path({str(tmp_path)!r}), ()) if c.name == 'open files'])"
    )
    few = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "status='weak'" in few and "256 at once" in few and "ulimit -Hn" in few


def test_another_folder_can_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.run_doctor, "__defaults__", (Path("runs"), ()))
    (tmp_path / "file").write_text("")
    bad = CliRunner().invoke(cli.app, ["doctor", "--out", str(tmp_path / "file" / "runs")])
    assert bad.exit_code == 1 and "vans doctor --out" in " ".join(bad.output.split())
    assert CliRunner().invoke(cli.app, ["doctor", "--out", str(tmp_path / "runs")]).exit_code == 0
