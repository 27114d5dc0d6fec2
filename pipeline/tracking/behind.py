"""Writes rollouts behind the step, in a thread of its own: a slow disk never holds up a step, a failing one never ends the run.

At most ``WAITING`` steps wait. One that comes while so many do is left out and counted, because frames of real clips are
large. What a file holds is ``rollouts``'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import write_failure
from pipeline.tracking.rollouts import FOLDER, StepRollouts, prune, write_step

WAITING = 2
"""Steps that may wait to be written, beside the one that is."""

log = logging.getLogger(__name__)


@dataclass
class RolloutCounts:
    """What became of the steps so far."""

    written: int = 0
    failed: int = 0  # the disk did not take it
    skipped: int = 0  # it was left out, because too many waited
    bytes: int = 0
    seconds: float = 0.0  # spent writing

    @property
    def lost(self) -> int:
        """Steps that are not stored."""
        return self.failed + self.skipped


class RolloutWriter:
    """Writes the rollouts of one run into ``run``/rollouts and keeps the newest ``keep`` steps of each stage.

    ``require_owned`` raises where the folder is not this process's any more; then nothing is written. The thread is a daemon:
    a disk that never answers does not keep the process.
    """

    def __init__(self, run: Path, keep: int, require_owned: Callable[[], None] = lambda: None) -> None:
        self.run, self.keep, self.counts = run, keep, RolloutCounts()
        self._require_owned = require_owned
        self._change = threading.Condition()
        self._waiting: deque[StepRollouts] = deque()
        self._busy = False
        self._closed = False
        self._news: list[str] = []
        self._told = ""  # the last reason, which is told once
        self._thread: threading.Thread | None = None

    def put(self, rollouts: StepRollouts) -> None:
        """Have ``rollouts`` written, and return at once; they are left out where too many wait already."""
        with self._change:
            if self._closed or len(self._waiting) >= WAITING:
                self._lose(rollouts, f"{len(self._waiting)} steps wait to be written already", skipped=True)
                return
            self._waiting.append(rollouts)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def news(self) -> list[str]:
        """Return lines for people about what was lost since the last call."""
        with self._change:
            lines, self._news = self._news, []
        return lines

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything put so far is written or counted as lost; False where ``timeout_s`` passed first."""
        with self._change:
            return self._change.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write the rest within ``timeout_s``, and take no more."""
        done = self.flush(timeout_s)
        with self._change:
            self._closed = True
            self._change.notify_all()
        if not done:
            log.error("the last rollouts were not written within %.0f s", timeout_s)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                rollouts = self._waiting.popleft()
                self._busy = True
            started, why, size = time.monotonic(), "", 0
            try:
                self._require_owned()
                size = write_step(self.run / FOLDER, rollouts).stat().st_size
                self._prune(rollouts)
            except Exception as error:  # noqa: BLE001 - a disk, or a clip that cannot be encoded, must not end the run; it is told
                why = write_failure(error) or f"{type(error).__name__}: {error}"
            with self._change:
                self.counts.seconds += time.monotonic() - started
                self.counts.bytes += size
                self.counts.written += bool(size)
                if why:
                    self._lose(rollouts, why)
                self._busy = False
                self._change.notify_all()

    def _prune(self, rollouts: StepRollouts) -> None:
        try:
            prune(self.run, rollouts.stage, rollouts.step, self.keep)
        except OSError as error:  # the new one is in its place all the same
            log.warning("old rollouts could not be removed: %s", error)

    def _lose(self, rollouts: StepRollouts, why: str, skipped: bool = False) -> None:
        self.counts.skipped += skipped
        self.counts.failed += not skipped
        told = f"the rollouts of {rollouts.stage} step {rollouts.step} are not stored: {why}"
        log.warning(told)
        if why != self._told:  # a full disk would be told at every step
            self._told = why
            self._news.append(f"{told}. The run goes on; more of the same is counted (tracking/rollouts_lost)")
