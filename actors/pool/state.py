"""The life of one worker, as a state machine without Ray, threads or a clock.

::

    STARTING ──> STALE ──> READY ──> SUSPECT ──> DEAD ──> RESTARTING ──> STALE …
                 (loads     (serves)  (probed)            (a new process)
                 weights)

* **STARTING**: the first process of this slot is being placed and loads its model.
* **STALE**: alive, but its weights are not the current ones. Calls that it had before finish; it gets no new ones. It
  loads the current weights when its last call has ended.
* **READY**: holds the current weights and serves.
* **SUSPECT**: it could not be reached, or failed for a reason of its machine. It gets nothing until a probe is
  answered.
* **DEAD**: its process is gone, or was killed because it did not answer in time. Its requests are sent again elsewhere.
* **RESTARTING**: a new process takes the slot.
* **RETIRED**: the pool shrank; its last calls finish, then it is ended.

The transition that must not exist is DEAD → READY, and with it RESTARTING → READY, STARTING → READY and SUSPECT →
READY. A new process holds the weights of the model folder, not those that were trained since: were it to serve at once,
it would answer with weights of version 0 in the middle of a run, and nothing would look wrong but a slightly worse
reward. The only way into READY therefore leads through STALE, and the only way out of STALE into READY is
:meth:`Worker.loaded` with the current version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from cluster.names import worker_name


class WorkerState(StrEnum):
    """See the module's docstring."""

    STARTING = "starting"
    STALE = "stale"
    READY = "ready"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    RETIRED = "retired"


S = WorkerState

TRANSITIONS: dict[WorkerState, frozenset[WorkerState]] = {
    S.STARTING: frozenset({S.STALE, S.DEAD, S.RETIRED}),
    S.STALE: frozenset({S.READY, S.SUSPECT, S.DEAD, S.RETIRED}),
    S.READY: frozenset({S.STALE, S.SUSPECT, S.DEAD, S.RETIRED}),
    S.SUSPECT: frozenset({S.STALE, S.DEAD, S.RETIRED}),
    S.DEAD: frozenset({S.RESTARTING, S.RETIRED}),
    S.RESTARTING: frozenset({S.STALE, S.DEAD, S.RETIRED}),
    S.RETIRED: frozenset(),
}

ALIVE = frozenset({S.STALE, S.READY, S.SUSPECT})
"""States in which the worker's process has been seen alive and belongs to the pool."""

COMING = frozenset({S.STARTING, S.RESTARTING})
"""States in which a process is being started."""

Errand = Literal["start", "load", "probe"]
"""What the pool asks of a worker beside requests; at most one at a time, and no request is sent meanwhile."""


class IllegalTransition(RuntimeError):
    """A transition that the state machine does not have; always a bug of the pool."""


@dataclass(eq=False)
class Worker:
    """One slot of a pool, and the process in it. The dispatcher owns it; nothing else changes it."""

    pool: str
    slot: int
    incarnation: int = 1
    state: WorkerState = S.STARTING
    version: int | None = None
    """Weights version loaded by the process; None before the first load."""
    calls: dict[int, float] = field(default_factory=dict)
    """Calls under way: id → time of dispatch in seconds."""
    errand: Errand | None = None
    side_calls: int = 0
    """Calls of ``call_all`` under way; a probe would wait behind them and prove nothing."""
    placed: bool = False
    """The cluster had room: the process runs and loads, or has loaded, its model."""
    seen: bool = False
    """The process has been heard of since it loaded its model."""
    not_before: float = 0.0
    """Earliest time at which the process is started (seconds): restarts of a slot that keeps dying back off."""
    strikes: int = 0
    """Infrastructure failures since its last good answer."""
    failed_starts: int = 0
    """Deaths of this slot since it was last READY."""
    last_heard: float = 0.0
    last_sent: int = 0
    requests_done: int = 0

    @property
    def name(self) -> str:
        """The name of the process in this slot."""
        return worker_name(self.pool, self.slot, self.incarnation)

    def move(self, to: WorkerState) -> None:
        """Go to state ``to``, or raise :class:`IllegalTransition`."""
        if to not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.name}: {self.state} → {to}")
        self.state = to

    def started(self) -> None:
        """The process has loaded its model; whatever version it holds is not trusted."""
        self.version = None
        self.placed = self.seen = True
        self.move(S.STALE)

    def loaded(self, version: int, current: int) -> None:
        """The process holds ``version``; it serves if that is the ``current`` one, otherwise it stays STALE."""
        self.version = version
        if version == current:
            self.move(S.READY)
            self.failed_starts = 0

    def restart(self, not_before: float) -> None:
        """A new process takes the slot of a DEAD one, not before ``not_before``."""
        self.move(S.RESTARTING)
        self.incarnation += 1
        self.version = None
        self.placed = self.seen = False
        self.errand = None
        self.side_calls = 0
        self.strikes = 0
        self.requests_done = 0
        self.not_before = not_before
