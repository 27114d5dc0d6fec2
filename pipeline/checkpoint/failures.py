"""What happens when a checkpoint cannot be written: the run goes on with the one before, up to a limit.

A full disk may be cleared while the run goes on, and hours of training are worth more than one checkpoint. But a run that
writes none any more is one that a crash would cost all of it, so it stops after a few in a row, and at the end of a stage.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CheckpointWriteError, VansError
from cluster.storage import write_failure
from pipeline.checkpoint.store import CheckpointStore


@dataclass
class WriteFailures:
    """Counts the checkpoints of a run that could not be written; ``limit`` in a row end it (checkpoint.max_failures)."""

    store: CheckpointStore
    limit: int
    total: int = 0
    in_a_row: int = 0

    async def attempt(self, writing: Awaitable[None], what: str, *, last: bool) -> str | None:
        """Await ``writing`` of the checkpoint ``what``; returns None when it is written, else a warning for people.

        Raises CheckpointWriteError where it is the ``last`` of a stage, or one too many in a row.
        """
        try:
            await writing
        except Exception as error:
            why = str(error) if isinstance(error, CheckpointWriteError) else write_failure(error)
            if why is None or (isinstance(error, VansError) and not isinstance(error, CheckpointWriteError)):
                raise
            self.total += 1
            self.in_a_row += 1
            told = f"the checkpoint of {what} could not be written: {why}"
            if last or self.in_a_row >= self.limit:
                reason = "it is the last one of its stage" if last else f"that makes {self.in_a_row} in a row"
                more = "" if last else f" (checkpoint.max_failures={self.limit})"
                raise CheckpointWriteError(
                    f"{told}\nThe run stops, because {reason}{more}. Make room under {self.store.root}; {self._kept(True)}"
                ) from error
            return f"{told}. The run goes on; {self._kept(False)}"
        self.in_a_row = 0
        return None

    def _kept(self, stopped: bool) -> str:
        path: Path | None = next(iter(self.store.paths()), None)
        if path is None:
            return "there is no earlier checkpoint" + (", so it has to be started again" if stopped else "")
        return f"{path} is kept" + (", and --resume continues from it" if stopped else "")
