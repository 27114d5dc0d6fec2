"""When a run's checkpoints go to its mirror: in a thread of its own, so that training waits for it at the run's end only.

The newest checkpoint goes first; one that a newer overtakes is not sent. Exports go before the checkpoint that follows them, because
the next stage cannot go on without them. What could not be sent is counted, told, and goes with the next one; too many in a row end
the run, whose own folder has everything (see ``failures`` for why).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cluster.errors import CheckpointWriteError, StorageError, VansError
from pipeline.checkpoint.mirror import ChangedError, Mirror
from pipeline.lock import LockLostError

PAUSES_S = (2.0, 15.0)  # before an upload that failed is tried again; a store's client has tried for seconds each time

log = logging.getLogger(__name__)


class DeadlineError(StorageError):
    """An upload took longer than checkpoint.mirror_timeout_s."""


class Uploads:
    """The uploads of one run to ``mirror`` (None: nothing is sent); ``limit`` failures in a row end it (checkpoint.max_failures).

    ``timeout_s`` bounds one checkpoint's upload. ``require_owned`` raises LockLostError where another run has taken the folder
    or the mirror over; then nothing more is sent. The thread is a daemon, so that a store that never answers does not keep the
    process for ever: at its end S3's client may still wait for its own time-outs, some minutes at most.
    """

    def __init__(
        self,
        mirror: Mirror | None = None,
        limit: int = 3,
        timeout_s: float = 900.0,
        require_owned: Callable[[], None] = lambda: None,
    ) -> None:
        self._require_owned = require_owned
        self.mirror, self.limit, self.timeout_s = mirror, limit, timeout_s
        self.total = 0  # uploads that failed, since the start
        self.in_a_row = 0
        self.in_use: set[Path] = set()  # folders that are being sent, and must stay
        self.newest = ""  # where the newest checkpoint lies that is whole in the mirror
        self._change = threading.Condition()
        self._exports: dict[str, Path] = {}
        self._waiting: Path | None = None
        self._unsent: Path | None = None  # the newest that failed
        self._began: float | None = None  # when the upload under way began
        self._late = False  # it has been counted as a failure while it goes on
        self._todo = False  # there is something that has not been tried since it was offered
        self._why = ""  # the last upload failed
        self._news: list[str] = []
        self._thread: threading.Thread | None = None

    def offer(self, checkpoint: Path) -> None:
        """Send the folder of a checkpoint, in place of one that still waits."""
        with self._change:
            if self._late and self._waiting is not None:
                self._fail(self._waiting.name, "the upload before it has not ended")
            self._waiting = checkpoint
            self._wake()

    def offer_export(self, folder: Path) -> None:
        """Send the folder of a model or adapter, before the next checkpoint."""
        with self._change:
            self._exports[folder.name] = folder
            self._wake()

    def news(self) -> list[str]:
        """Return what failed since the last call, as lines for people; raises CheckpointWriteError at the limit."""
        with self._change:
            if self._began is not None and not self._late and time.monotonic() - self._began > self.timeout_s:
                self._late = True
                self._fail("an upload", f"it has not ended within checkpoint.mirror_timeout_s={self.timeout_s:g}")
            lines, self._news = self._news, []
            if self.in_a_row < self.limit:
                return [f"{line}. The run goes on, and its own folder has everything" for line in lines]
            assert self.mirror is not None
            last = lines[-1] if lines else "nothing could be sent"
            raise CheckpointWriteError(
                f"{last}\nThe run stops, because that makes {self.in_a_row} in a row (checkpoint.max_failures={self.limit}). "
                f"Nothing is lost here: --resume goes on and sends it to {self.mirror.root}; with checkpoint.mirror=null it "
                "goes on without a mirror"
            )

    def finish(self) -> str | None:
        """Wait, ``timeout_s`` at most, until all is sent, what failed before once more; returns what is not, None for nothing."""
        with self._change:
            if self._waiting is None and self._unsent is not None:
                self._waiting = self._unsent
            if self._waiting is not None or self._exports:
                self._wake()
            self._change.wait_for(lambda: self._idle, self.timeout_s)
            if not self._idle:
                return f"the upload has not ended within checkpoint.mirror_timeout_s={self.timeout_s:g}"
            left = [*self._exports, *([self._unsent.name] if self._unsent else [])]
            return f"{', '.join(left)} could not be sent: {self._why}" if left else None

    @property
    def idle(self) -> bool:
        """Whether nothing is being sent, nor waits for it."""
        with self._change:
            return self._idle

    # --- the thread -------------------------------------------------------------------------------------------------

    @property
    def _idle(self) -> bool:
        return self._began is None and not self._todo

    def _wake(self) -> None:
        if self.mirror is None:
            self._waiting, self._exports = None, {}
            return
        self._todo = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._todo)
                exports, checkpoint = dict(self._exports), self._waiting
                self._waiting, self._todo = None, False
                self.in_use |= {checkpoint} if checkpoint else set()
                self._began, self._late = time.monotonic(), False
            why = self._try(exports, checkpoint, self._began + self.timeout_s)
            with self._change:
                self.in_use.clear()
                overtaken = why is not None and isinstance(why, ChangedError) and self._waiting is not None
                if why is None:
                    self.in_a_row, self._unsent = 0, None
                    self._exports = {n: f for n, f in self._exports.items() if exports.get(n) != f}
                    if checkpoint and self.mirror:
                        self.newest = f"{self.mirror.root}/{checkpoint.parent.name}/{checkpoint.name}"
                elif not overtaken:
                    self._unsent = checkpoint or self._unsent
                    self._why = str(why)
                    if not self._late:
                        self._fail(checkpoint.name if checkpoint else ", ".join(exports), self._why)
                self._began, self._late = None, False
                self._change.notify_all()

    def _fail(self, what: str, why: str) -> None:
        self.total += 1
        self.in_a_row += 1
        self._news.append(f"{what} could not be sent to the mirror: {why}")

    def _try(self, exports: dict[str, Path], checkpoint: Path | None, deadline: float) -> Exception | None:
        """Send, again after each of PAUSES_S; returns the last error, None where all is sent."""
        error: Exception | None = None
        for pause_s in (*PAUSES_S, None):
            try:
                self._send(exports, checkpoint, deadline)
                return None
            except (ChangedError, DeadlineError, LockLostError) as found:
                return found
            except VansError as found:
                error = found
            except Exception as found:  # a bug here must not end the thread, and is told
                log.exception("sending to the mirror")
                return found
            if pause_s is None or time.monotonic() + pause_s > deadline:
                return error
            time.sleep(pause_s)
        return error

    def _send(self, exports: dict[str, Path], checkpoint: Path | None, deadline: float) -> None:
        assert self.mirror is not None

        def check() -> None:
            if time.monotonic() > deadline:
                raise DeadlineError(f"it took longer than checkpoint.mirror_timeout_s={self.timeout_s:g}")

        for folder in exports.values():
            self._require_owned()
            self.mirror.send_export(folder, check)
        if checkpoint is not None:
            self._require_owned()
            self.mirror.send(checkpoint, check)


@contextmanager
def uploads_to(
    mirror: Mirror | None,
    limit: int,
    timeout_s: float,
    console: Console,
    require_owned: Callable[[], None] = lambda: None,
) -> Iterator[Uploads]:
    """Yield the uploads of a run, and wait for the last ones when the block ends, whatever ended it.

    Raises CheckpointWriteError where the block ends well and something could not be sent; after an error that is only told.
    """
    uploads = Uploads(mirror, limit, timeout_s, require_owned)
    failed = True
    try:
        yield uploads
        failed = False
    finally:
        if not uploads.idle:
            console.print(
                f"sending the last checkpoint to {mirror.root if mirror else ''}", highlight=False, markup=False
            )
        left = uploads.finish() if mirror is not None else None
        if left is not None:
            assert mirror is not None
            told = (
                f"{mirror.root} is not complete: {left}\nThe run's own folder has everything; --resume sends the rest"
            )
            if not failed:
                raise CheckpointWriteError(told)
            console.print(told, style="bold yellow", markup=False, highlight=False, soft_wrap=True)
