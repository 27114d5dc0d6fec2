"""A user's reward called: whose fault it is where it raises, and when another call may help. No torch, no Ray.

Whatever it raises is the answer's failure, since one odd clip must not end a run of days; but not a load that fails, which no
other sample would survive.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from actors.failures import BadSampleError, InfrastructureError
from actors.scoring.model import RewardLoadError
from cluster.errors import VansError

T = TypeVar("T")

TRIES = 3
"""Calls of a reward that could not reach its judge, or had no memory, before the answer counts as lost."""

TRANSIENT: tuple[type[BaseException], ...] = (InfrastructureError, ConnectionError, TimeoutError, MemoryError)
"""What another call may survive, beside a GPU's full memory."""

_RAISED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)


def transient(error: BaseException) -> bool:
    """Return whether another call may survive ``error``."""
    return isinstance(error, TRANSIENT) or type(error).__name__ == "OutOfMemoryError"  # torch's, where there is one


def load_failed(error: BaseException, worked: bool) -> bool:
    """Return whether ``error`` says that a model or a module could not be loaded; ``worked``: the reward has given a value before.

    Files that cannot be read are a sample's fault only in a reward that has worked.
    """
    if transient(error):
        return False
    return isinstance(error, ImportError | VansError) or (isinstance(error, OSError) and not worked)


def tried(path: str, call: Callable[[], T], *, worked: bool, wait_s: float, tries: int = TRIES) -> T:
    """Return what ``call`` of the reward ``path`` gives, called again after ``wait_s`` (then twice as long) where that may help.

    Raises:
        RewardLoadError: something could not be loaded.
        BadSampleError: anything else; the message says what the reward raised, and where.
    """
    for number in range(tries):
        try:
            return call()
        except _RAISED as error:
            if transient(error) and number < tries - 1:  # a judge may answer the next time
                time.sleep(wait_s * 2**number)
                continue
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"({Path(where.filename).name}, line {where.lineno}, in {where.name})"
            if load_failed(error, worked):
                raise RewardLoadError(
                    f"reward {path!r} could not load what it needs: {type(error).__name__}: {error} {at}"
                ) from error
            again = f" in each of {tries} tries, the last time" if transient(error) else ""
            raise BadSampleError(f"reward {path!r} raised{again} {type(error).__name__}: {error} {at}") from error
    raise AssertionError("a reward is tried at least once")
