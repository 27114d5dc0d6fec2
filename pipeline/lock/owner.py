"""Who holds a lock: a process, told apart from a later one with its number, and from one of another machine or container."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil

Liveness = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True)
class Owner:
    """The content of a lock. Its length does not depend on ``beats`` and ``beat``, so that they can be overwritten in place."""

    token: str
    """Of this one holding of the lock."""
    what: str
    """The command, for people: ``vans train``."""
    host: str
    boot: str
    """The kernel's own number of its start; "" where there is none."""
    pids: str
    """The namespace of process numbers: each container has its own."""
    pid: int
    started: str
    """When the process started, on a clock that nobody can set."""
    since: str
    """When the lock was taken, UTC."""
    beat: str
    """The last sign of life, UTC, for people. The clocks of two machines are never compared."""
    beats: int = 0

    @classmethod
    def here(cls, what: str) -> Owner:
        """Return this process as an owner."""
        now, pid = _utc(), os.getpid()
        return cls(
            uuid.uuid4().hex, what, socket.gethostname(), _boot(), _namespace(), pid, _started(pid) or "", now, now
        )

    @classmethod
    def parse(cls, content: bytes) -> Owner:
        """Return what ``content`` says; an owner of which nothing is known where it is damaged, or not yet written."""
        try:
            values = json.loads(content.decode("utf-8"))
            found = cls(**{**values, "beats": int(values["beats"])})
            if type(found.pid) is int and 0 < found.pid < 2**31 and all(type(getattr(found, n)) is str for n in _TEXTS):
                return found
        except (ValueError, TypeError, KeyError):
            pass
        digest = hashlib.sha256(content).hexdigest()[:32]
        return cls(digest, "an unknown command", "an unknown host", "?", "?", 0, "", "an unknown time", "unknown")

    def content(self) -> bytes:
        """Return the owner as :meth:`parse` reads it."""
        values = dataclasses.asdict(self) | {"beats": f"{self.beats:012d}"}
        return (json.dumps(values, indent=1) + "\n").encode()

    def after_a_beat(self) -> Owner:
        """Return the owner with a sign of life more."""
        return dataclasses.replace(self, beat=_utc(), beats=self.beats + 1)

    def liveness(self) -> Liveness:
        """Return whether the process is there, as far as this machine can tell; ``unknown`` for another machine or container."""
        if (self.host, self.boot, self.pids) != (socket.gethostname(), _boot(), _namespace()):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except PermissionError:  # another user's
            pass
        started = _started(self.pid)
        if started is None:
            return "unknown"
        return "alive" if started == self.started else "dead"

    def __str__(self) -> str:
        return f"{self.what} on {self.host}, process {self.pid}, since {self.since}, last sign of life {self.beat}"


_TEXTS = ("token", "what", "host", "boot", "pids", "started", "since", "beat")


def _utc() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@lru_cache
def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when process ``pid`` started; "" for one that has ended and was not waited for, None where it cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # clock ticks since the machine's start
    except OSError:
        pass
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None
