"""Ends the processes of a vLLM engine when the process that started them dies without a word (kill -9, out of memory).

vLLM's engine core would go on for ever, with its memory, and Ray ends only the worker itself. So a small process watches beside
the worker: it notes the worker's descendants while the worker lives, and kills what is left of them when it does not. It runs as
a script, outside the package, so that it imports nothing heavy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

POLL_S = 0.5


def watch(parent: int) -> None:
    """Wait until process ``parent``, which started this one, is gone; then kill all descendants that it had."""
    known: set[psutil.Process] = set()
    while os.getppid() == parent:
        try:
            known |= set(psutil.Process(parent).children(recursive=True))
        except psutil.NoSuchProcess:
            break
        time.sleep(POLL_S)
    for process in known:  # psutil knows a process by its start too: a pid that was given away again is not touched
        if process.pid != os.getpid():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass


def start_guard() -> subprocess.Popen[bytes]:
    """Start the watch over the calling process; end it with ``kill`` when nothing is left to guard."""
    return subprocess.Popen([sys.executable, __file__, str(os.getpid())], stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
