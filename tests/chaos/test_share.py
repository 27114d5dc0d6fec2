"""The share of the chaos tests that CI runs: changes with the commit, ends in time, and fails only where a test does."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.share import rank, run, summary

FILES = [f"tests/chaos/test_{letter}.py" for letter in "abcdef"]
SLEEPS = """
import subprocess, sys, time, pathlib
def test_sleeps():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(__file__).with_name("pid").write_text(str(child.pid))
    time.sleep(600)
"""


def share(folder: Path, seconds: float, commit: str = "a", **tests: str) -> int:
    """Run the share of a folder whose files hold ``tests``; the timeout of the suite is not theirs."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, text in tests.items():
        (folder / f"test_{name}.py").write_text(text)
    return run(["-q", "-c", str(folder / "pytest.ini"), "--import-mode=importlib", str(folder)], seconds, commit)


def test_every_file_comes_first_at_some_commit() -> None:
    firsts = {min(FILES, key=lambda file: rank(file, str(commit))) for commit in range(100)}
    assert firsts == set(FILES)


def test_what_passes_passes_and_what_fails_fails(tmp_path: Path) -> None:
    assert share(tmp_path, 60, good="def test_good(): pass\n") == 0
    assert share(tmp_path, 60, bad="def test_bad(): assert 0\n") == 1


def test_a_test_that_may_take_longer_than_the_share_is_left_out(tmp_path: Path) -> None:
    long = "import pytest\n@pytest.mark.timeout(61)\ndef test_long(): assert 0\n"
    assert share(tmp_path, 60, good="def test_good(): pass\n", long=long) == 0


def test_a_share_whose_time_is_up_fails_where_a_test_has_failed() -> None:
    passed = ["began a::x", "ended a::x", "began a::y"]
    assert summary(passed, 9) == ("the time of 9 s is up: 1 tests ended, 0 failed; cut off: a::y", 0)
    failed = ["began a::x", "failed a::x", "ended a::x", "began a::y", "ended a::y"]
    assert summary(failed, 9) == ("the time of 9 s is up: 2 tests ended, 1 failed; cut off: none", 1)


def test_a_test_that_runs_when_the_time_is_up_is_ended_with_what_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert share(tmp_path, 12, only=SLEEPS) == 0
    assert time.monotonic() - started < 60
    assert "::test_sleeps" in capfd.readouterr().out.partition("cut off: ")[2]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
