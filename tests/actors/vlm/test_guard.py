"""The guard ends what a worker started, grandchildren too, when the worker is killed with -9; while it lives, nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

PARENT = """
import subprocess, sys, time
from actors.vlm.guard import start_guard
start_guard()
nest = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
subprocess.Popen([sys.executable, "-c", nest])
time.sleep(300)
"""


def test_descendants_of_a_killed_process_are_ended() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT])
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(family) < 3 and time.monotonic() < deadline:
            family = psutil.Process(parent.pid).children(recursive=True)
            time.sleep(0.1)
        assert len(family) == 3  # the guard, the child and its child
        time.sleep(2.0)
        assert all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    finally:
        parent.kill()
        for process in family:
            if process.is_running():
                process.kill()
