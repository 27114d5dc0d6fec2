"""How a run is asked to stop: the first SIGINT or SIGTERM is a request, the second ends the process at once.

A request cancels what the driver is doing, except in a ``deferred`` block: there it is only noted, and the code in the block
stops where nothing is lost (the stage loop, between an update and the next). ``ray job stop`` sends SIGTERM, and SIGKILL after
RAY_JOB_STOP_WAIT_TIME_S seconds (3 unless the job's environment says otherwise).
This module writes no checkpoint and knows no stage.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from cluster.errors import VansError
from pipeline.support import terminal

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(VansError):
    """A signal ended the run; the message says what is kept and how to go on."""

    def __init__(self, signum: signal.Signals, told: str) -> None:
        super().__init__(told)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + int(self.signum)


class StopRequest:
    """Whether, and by which signal, the run was asked to stop."""

    def __init__(self) -> None:
        self.signum: signal.Signals | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._asked = asyncio.Event()
        self._deferred = 0

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str:
        """The signal's name; "" while there is none."""
        return self.signum.name if self.signum is not None else ""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on an event loop of its own, as ``asyncio.run`` does; a request cancels it unless it defers that.

        Raises KeyboardInterrupt where a request cancelled it.
        """
        return asyncio.run(self._guard(work))

    async def race(self, work: Awaitable[T]) -> T | None:
        """Return the result of ``work``; None, with ``work`` cancelled and ended, where a stop is requested first."""
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            return None if self else task.result()
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
            await asyncio.gather(task, asked, return_exceptions=True)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a request is only noted; the block looks at it and says itself where to stop."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def ask(self, signum: signal.Signals) -> None:
        """Note the request. Called by the signal's handler, in the main thread."""
        self.signum = signum
        if self._loop is None:
            raise KeyboardInterrupt(signum.name)  # not an Exception, so that no library takes it for its own
        self._loop.call_soon_threadsafe(self._tell)

    async def _guard(self, work: Coroutine[Any, Any, T]) -> T:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        try:
            return await self._task
        except asyncio.CancelledError:
            if self:
                raise KeyboardInterrupt(self.name) from None
            raise
        finally:
            self._loop = self._task = None

    def _tell(self) -> None:
        self._asked.set()
        if self._task is not None and not self._deferred:
            self._task.cancel()


@contextmanager
def stop_on_signals(told: Callable[[StopRequest], str]) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM within the block into RunStopped with the message ``told``; a second ends the process.

    Earlier handlers are restored at the end. Outside the main thread, where Python allows no handlers, nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _: FrameType | None) -> None:
        if request:
            os._exit(128 + number)  # a local Ray ends with this process, a joined one ends its actors
        heard = f"\n{signal.Signals(number).name}: stopping; a second signal ends the run at once\n"
        terminal.alert(heard)  # not print: the signal may have come in the middle of one
        request.ask(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    except KeyboardInterrupt:
        if not request:  # raised by somebody else
            raise
        assert request.signum is not None
        raise RunStopped(request.signum, told(request)) from None
    except RunStopped as stopped:  # by a block within this one
        request.signum = stopped.signum
        raise RunStopped(stopped.signum, told(request)) from None
    except SystemExit as error:  # Ray, while it connects, answers SIGTERM in its own way
        if request or error.code != signal.SIGTERM:
            raise
        request.signum = signal.SIGTERM
        raise RunStopped(request.signum, told(request)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
