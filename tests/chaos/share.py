"""``python -m tests.chaos.share``: as many chaos tests as a time allows, in an order that the commit decides.

They take too long to run all of them on every change. Files come in the order of a digest of their name and the commit, so that
the next commit runs others; a file's tests keep their order, because they share what it starts. A test whose own time limit is
longer than the share is left to ``make chaos``. The test that is running when the time is up is ended with all that it started,
and is neither a pass nor a failure: the exit status is 0 unless a test has failed or pytest itself has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes import kill

ROOT = Path(__file__).resolve().parents[2]
COMMIT, SECONDS, NOTES = "VANS_SHARE_COMMIT", "VANS_SHARE_SECONDS", "VANS_SHARE_NOTES"


def rank(file: str, commit: str) -> str:
    """Return what the tests of ``file`` are sorted by at ``commit``."""
    return hashlib.sha256(f"{commit} {file}".encode()).hexdigest()


def run(arguments: Sequence[str], seconds: float, commit: str) -> int:
    """Run pytest with ``arguments`` for ``seconds`` at most; returns the exit status, 0 where all that ended has passed."""
    with tempfile.TemporaryDirectory(prefix="vans-share-") as folder:
        notes = Path(folder) / "notes"
        notes.touch()
        environment = {**os.environ, COMMIT: commit, SECONDS: str(seconds), NOTES: str(notes)}
        command = [sys.executable, "-m", "pytest", "-p", "tests.chaos.share", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                kill(process)
        told, status = summary(notes.read_text().splitlines(), seconds)
        print(f"\n{told}")
        return status


def summary(notes: Sequence[str], seconds: float) -> tuple[str, int]:
    """Return what is told of a share whose time was up, and its exit status. ``notes``: a line "began|failed|ended TEST" each."""
    lines = [line.split(" ", 1) for line in notes]
    ended = {test for outcome, test in lines if outcome != "began"}
    cut = [test for outcome, test in lines if outcome == "began" and test not in ended]
    failed = {test for outcome, test in lines if outcome == "failed"}
    told = f"the time of {seconds:g} s is up: {len(ended)} tests ended, {len(failed)} failed; cut off: {', '.join(cut) or 'none'}"
    return told, int(bool(failed))


def newest_commit() -> str:
    """Return the hash of the commit that is checked out."""
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


# --- within the pytest that ``run`` starts ----------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests, and leave out those that may take longer than the share."""
    commit, seconds = os.environ[COMMIT], float(os.environ[SECONDS])
    long = [item for item in items if (mark := item.get_closest_marker("timeout")) and mark.args[0] > seconds]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: rank(item.nodeid.partition("::")[0], commit))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note that a test begins."""
    _note("began", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note that a test has failed, or ended."""
    if report.failed:
        _note("failed", report.nodeid)
    elif report.when == "teardown":
        _note("ended", report.nodeid)


def _note(outcome: str, test: str) -> None:
    with Path(os.environ[NOTES]).open("a", encoding="utf-8") as file:
        file.write(f"{outcome} {test}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a share of the chaos tests.")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--commit", default=None, help="whose share; default: the one that is checked out")
    options = parser.parse_args()
    sys.exit(run(["-m", "chaos"], 60 * options.minutes, options.commit or newest_commit()))
