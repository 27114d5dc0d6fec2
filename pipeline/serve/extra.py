"""The extra ``serve``: what the server needs beside the rest, installed by the command that needs it. Imports none of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from cluster.errors import VansError
from cluster.session import ROOT
from pipeline.support import terminal

CONSTRAINTS = "constraints-serve.txt"
NEEDED = {"grpc_reflection": "grpcio-reflection", "gradio": "gradio"}
"""Modules that are there where the extra is, and the distributions that they come from."""


def missing() -> list[str]:
    """Return the distributions of the extra that are not installed."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def require_extra(*, install: bool) -> None:
    """Install the extra where it is missing, from a source checkout and with ``install``. Raises VansError with the command."""
    lacking = missing()
    if not lacking:
        return
    listed = ROOT / CONSTRAINTS
    words = [sys.executable, "-m", "pip", "install", "--no-deps", "-r", str(listed)]
    if not listed.is_file():
        words = [sys.executable, "-m", "pip", "install", "vans-on-ray[serve]"]
    told = f"vans serve needs the extra `serve`; not installed: {', '.join(lacking)}"
    if not install or not listed.is_file():
        raise VansError(f"{told}: {' '.join(words)}")
    console = terminal.console()
    console.print(f"{told}; installing {CONSTRAINTS}, once", highlight=False, markup=False)
    done = subprocess.run([*words, "-q", "--disable-pip-version-check"], capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode or missing():
        reason = done.stderr.strip().splitlines()[-1:] or [f"pip ended with status {done.returncode}"]
        raise VansError(f"{told}, and could not be installed: {reason[0]}. The command is: {' '.join(words)}")
