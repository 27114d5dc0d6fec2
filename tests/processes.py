"""Commands of this repository as processes of their own, with all that they start: watched, killed, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

PATIENCE_S = 400.0


@contextmanager
def command(log: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m pipeline ARGUMENTS``, writing to the end of ``log``; what is left of it ends with the block."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        kill(process)


def family(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> list[psutil.Process]:
    """All that ``process`` has started and that has not been orphaned."""
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def members(process: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """Those of the family whose command line has ``name``: Ray puts the actor's class there."""
    found = []
    for member in family(process):
        try:
            if name in " ".join(member.cmdline()):
                found.append(member)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(process: subprocess.Popen[bytes] | subprocess.Popen[str], others: Sequence[psutil.Process] = ()) -> None:
    """SIGKILL the process, and then what it leaves behind, as the end of a machine does."""
    left = [*family(process), *others]
    process.kill()
    for member in left:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(30)
    psutil.wait_procs(left, timeout=30)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for ``condition``; the process must live as long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-8000:]
        time.sleep(0.05)
