"""``control.json`` in a run's folder: where to find the run's board, and whether the run still goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from actors.control import board_name

FILE = "control.json"


@dataclass(frozen=True)
class RunRecord:
    """The contents of the file. Times are ISO 8601, UTC."""

    run: str
    address: str
    """Ray's GCS, host:port."""
    board: str
    """Name of the actor, in the namespace ``actors.control.NAMESPACE``."""
    host: str
    pid: int
    """The driver."""
    token: bool
    """Whether the cluster wants Ray's token; the token itself is not written down."""
    started: str
    state: Literal["starting", "running", "ended"] = "starting"
    ended: str = ""

    def write(self, folder: Path) -> None:
        """Put the file into ``folder``, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{FILE}.{os.getpid()}"
        draft.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        draft.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the file in ``folder``. OSError where there is none; ValueError or TypeError where it holds something else."""
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))


def new_record(run: str, address: str) -> RunRecord:
    """Return the record of a run that this process starts now."""
    token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"  # Ray sets it where it decides so itself
    board = board_name(run, uuid.uuid4().hex[:8])
    return RunRecord(run, address, board, socket.gethostname(), os.getpid(), token, utc_now())


def utc_now() -> str:
    """Return the time as the record writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
