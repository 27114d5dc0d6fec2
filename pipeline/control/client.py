"""``vans status`` and ``vans scale``: find a run, join its cluster, read its pools, ask for other sizes.

RUN is the run's folder, which says where the run is, or its name together with the cluster's address.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from actors.control import boards, find_board
from cluster.errors import VansError
from cluster.session import ClusterError, join
from pipeline.control.record import FILE, RunRecord
from pipeline.control.snapshot import RunView
from pipeline.support.location import local_path

READ_TIMEOUT_S = 15.0
MOST_WORKERS = 4096
"""More is a slip of the finger: each is a task of the run's event loop and an actor that waits for room."""
FRESH_S = 10.0
"""A snapshot older than this is told apart: the run's loop is held up, or its driver hangs."""
FOLLOW_S = 12.0
"""How long ``vans scale`` watches whether new workers find room."""

_SIZE = re.compile(r"(?P<pool>[A-Za-z0-9_-]+)=(?P<workers>[+-]?\d{1,9})")


class ControlError(VansError):
    """A run that cannot be found or asked, or a size that cannot be had."""


@dataclass(frozen=True)
class Scaled:
    """What became of a request: workers before and after by pool, and the pools' state a little later."""

    before: dict[str, int]
    after: dict[str, int]
    view: RunView

    def lines(self) -> Iterator[str]:
        """Yield a sentence for each pool."""
        for name, after in self.after.items():
            before, pool = self.before[name], self.view.pool(name)
            text = f"{name}: {before} → {after} workers" if before != after else f"{name}: {after} workers, as before"
            if pool.no_room:
                others = " The others go on serving." if pool.target > pool.no_room else ""
                text += f"; {pool.no_room} {'waits' if pool.no_room == 1 else 'wait'} for room in the cluster "
                text += f"(free: {self.view.free or 'nothing'}).{others}"
            elif after > before and pool.coming:
                text += f"; {pool.coming} {'starts' if pool.coming == 1 else 'start'}"
            yield text


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """Return workers by pool from ``vlm=3`` and the like; ControlError says what is wrong with one."""
    sizes: dict[str, int] = {}
    for text in texts:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ControlError(f"{text!r} is not POOL=WORKERS; write for instance vlm=3 vdm=6")
        pool, workers = match["pool"], int(match["workers"])
        if workers < 1:
            raise ControlError(f"{text}: a pool has at least 1 worker")
        if workers > MOST_WORKERS:
            raise ControlError(f"{text}: at most {MOST_WORKERS} workers")
        if pool in sizes:
            raise ControlError(f"{text}: pool {pool} is given twice")
        sizes[pool] = workers
    return sizes


class RunClient:
    """A run, from another process. Made by :func:`open_run`."""

    def __init__(self, run: str, board: Any) -> None:
        self.run = run
        self._board = board

    def view(self) -> tuple[RunView, float]:
        """Return the run's latest snapshot and its age in seconds. Raises ControlError."""
        text, age = self._get(self._board.read.remote(), READ_TIMEOUT_S)
        if not text:
            raise ControlError(f"run {self.run} has not shown its pools yet; ask again in a few seconds")
        return RunView.from_json(text), age

    def scale(self, sizes: Mapping[str, int], timeout_s: float) -> Scaled:
        """Change pools' sizes; return once the run has done so and new workers have found room, or seem not to.

        Raises ControlError: the run refused, which changes nothing, or did not answer within ``timeout_s``.
        """
        request = json.dumps(dict(sizes))
        answer = self._get(self._board.ask.remote(request, timeout_s), timeout_s + READ_TIMEOUT_S)
        if answer is None:
            raise ControlError(
                f"run {self.run} did not answer within {timeout_s:g} s; `vans status` shows whether its sizes changed later"
            )
        found = json.loads(answer)
        if "error" in found:
            raise ControlError(found["error"])
        deadline = time.monotonic() + FOLLOW_S
        while True:
            view, _ = self.view()
            pools = [view.pool(name) for name in sizes]
            told = all(pool.target == sizes[pool.name] for pool in pools)
            settled = all(pool.coming == pool.no_room for pool in pools)
            if (told and settled) or time.monotonic() > deadline:
                return Scaled(found["before"], found["after"], view)
            time.sleep(0.3)

    def _get(self, ref: Any, timeout_s: float) -> Any:
        import ray

        try:
            return ray.get(ref, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ControlError(f"run {self.run} does not answer: nothing came within {timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ControlError(f"run {self.run} does not answer: it has ended, or its board has ({reason})") from None


@contextmanager
def open_run(run: str, address: str | None = None) -> Iterator[RunClient]:
    """Join the cluster of ``run``, a folder or a name, for the length of the block.

    ``address`` is Ray's; without it the folder's own counts, and for a name RAY_ADDRESS. Raises ControlError.
    """
    folder = local_path(run)
    if (folder / FILE).is_file():
        record = _read(folder)
        where, name, board, token = address or record.address, record.run, record.board, record.token
    else:
        where, name, board, token = address or os.environ.get("RAY_ADDRESS", ""), run, "", False
        if folder.is_dir():
            raise ControlError(
                f"{run} holds no {FILE}: no run was started there, or it has not begun to start its pools"
            )
        if not where:
            raise ControlError(
                f"no such run: {run} is no run's folder; to ask by name give the cluster's --address too"
            )
    try:
        with join(where, token=token):
            handle = find_board(board or _board_of(name, where))
            if handle is None:
                raise ControlError(f"run {name} does not answer: the cluster at {where} does not have its board")
            yield RunClient(name, handle)
    except ClusterError as error:
        raise ControlError(f"run {name} does not answer: {_one_line(error)}") from None


def _read(folder: Path) -> RunRecord:
    """Return the record in ``folder`` of a run that goes on; ControlError for any other."""
    try:
        record = RunRecord.read(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ControlError(f"{folder / FILE} cannot be read: {_one_line(error)}") from None
    if record.state == "ended":
        raise ControlError(f"run {record.run} in {folder} has ended: {record.ended}")
    if record.host == socket.gethostname() and not psutil.pid_exists(record.pid):
        raise ControlError(
            f"run {record.run} in {folder} has ended without saying so: its driver (pid {record.pid}) is gone, killed perhaps"
        )
    if record.state == "starting":
        raise ControlError(
            f"run {record.run} in {folder} is starting its pools since {record.started}; ask again later"
        )
    return record


def _board_of(run: str, address: str) -> str:
    """Return the name of the only board of ``run`` in the joined cluster."""
    found = boards()
    names = found.get(run, [])
    if not names:
        there = f"the runs there are {', '.join(sorted(found))}" if found else "no run is there"
        raise ControlError(f"no such run: {run} at {address}; {there}")
    if len(names) > 1:
        raise ControlError(f"{len(names)} runs at {address} are called {run}; give the folder of the one that you mean")
    return names[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
