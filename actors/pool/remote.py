"""A pool's workers as Ray actors: made, asked, ended. One question has a deadline and an answer that says what kind of failure it was.

This is the only place where Ray's exceptions are told apart. Nothing here retries. A pool reaches its workers through a
``Transport`` alone, so its driver can be measured with hundreds of workers that have no process (tests/benchmarks).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError, RuntimeEnvSetupError

from actors.failures import Failure, classify
from cluster.errors import VansError, WorkerTimeoutError


class WorkerGone(Exception):
    """The actor's process has ended (or never began)."""


class WorkerUnreachable(Exception):
    """The call was lost on the way; the actor may be alive."""


class WorkerRaised(Exception):
    """The method raised; ``failure`` says of which class, with the worker's traceback.

    ``for_people``: it was raised on purpose, and its message says what to do (a missing model, say); no traceback needed.
    """

    def __init__(self, failure: Failure, for_people: bool = False) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.for_people = for_people


class Transport(Protocol):
    """How a pool makes, asks and ends its workers. Handles are opaque to the pool."""

    async def make(self, make_worker: Callable[[str], Any], name: str) -> Any:
        """Return the handle of a new worker, which may not have found room yet; raises what ``make_worker`` raises."""
        ...

    def ready(self, handle: Any) -> asyncio.Future[Any]:
        """Return what is done when the worker's process runs, with one of this module's exceptions where it never will."""
        ...

    async def ask(self, handle: Any, method: str, args: tuple[Any, ...], *, timeout_s: float, who: str) -> Any:
        """Return the answer of ``method``; raises as :func:`ask`."""
        ...

    def kill(self, handle: Any) -> None:
        """End the worker at once."""
        ...

    def close(self) -> None:
        """Let go of what the transport itself holds."""
        ...


class RayTransport:
    """Workers are Ray actors."""

    def __init__(self, pool: str) -> None:
        # One thread: submissions keep their order, so a ping is never overtaken by a long call.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix=f"{pool}-send")
        self._maker = ThreadPoolExecutor(4, thread_name_prefix=f"{pool}-make")

    async def make(self, make_worker: Callable[[str], Any], name: str) -> Any:
        """See :class:`Transport`; ``make_worker`` runs in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._maker, make_worker, name)

    def ready(self, handle: Any) -> asyncio.Future[Any]:
        """See :class:`Transport`."""
        return asyncio.ensure_future(_runs(handle.__ray_ready__.remote()))

    async def ask(self, handle: Any, method: str, args: tuple[Any, ...], *, timeout_s: float, who: str) -> Any:
        """See :class:`Transport`."""
        return await ask(
            lambda: getattr(handle, method).remote(*args),
            timeout_s=timeout_s,
            sender=self._sender,
            who=who,
            what=f"{method}()",
            hint="It is killed and replaced.",
        )

    def kill(self, handle: Any) -> None:
        """See :class:`Transport`."""
        ray.kill(handle, no_restart=True)

    def close(self) -> None:
        """See :class:`Transport`."""
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._maker.shutdown(wait=False, cancel_futures=True)


async def _runs(ref: ray.ObjectRef) -> None:
    """Wait until Ray says that the actor behind ``ref`` runs."""
    answer = asyncio.wrap_future(ref.future())
    answer.add_done_callback(_retrieve)
    await asyncio.wait({answer})  # Ray fills the future, whoever waits
    try:
        answer.result()
    except RayError as error:
        raise translate(error) from error


async def ask(
    call: Callable[[], ray.ObjectRef], *, timeout_s: float, sender: Executor, who: str, what: str, hint: str = ""
) -> Any:
    """Await the answer of ``call``, which submits an actor method and returns its ref.

    The submission copies its arguments into the object store, so it runs in ``sender`` and not on the event loop.

    Raises:
        WorkerTimeoutError: no answer within ``timeout_s`` (the submission included); names ``who`` and ``what``.
        WorkerGone, WorkerUnreachable, WorkerRaised: see there.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    sent = loop.run_in_executor(sender, call)
    try:
        await asyncio.wait({sent}, timeout=timeout_s)
        if not sent.done():
            raise _overdue(who, what, timeout_s, hint)
        answer = asyncio.wrap_future(sent.result().future())
        # Not wait_for: it would cancel the future, which Ray still wants to fill.
        answer.add_done_callback(_retrieve)
        await asyncio.wait({answer}, timeout=max(0.0, deadline - loop.time()))
        if not answer.done():
            raise _overdue(who, what, timeout_s, hint)
        return answer.result()
    except RayError as error:
        raise translate(error) from error


def translate(error: RayError) -> Exception:
    """Return Ray's ``error`` as one of this module's exceptions."""
    if isinstance(error, ActorDiedError):
        if error.actor_init_failed:  # the constructor raised; Ray keeps its text only
            last = str(error).strip().splitlines()[-1]
            return WorkerRaised(Failure("bug", f"the constructor raised {last}", str(error)))
        return WorkerGone(_short(str(error)))
    if isinstance(error, RuntimeEnvSetupError):  # it would fail on every node, each time after minutes
        told = f"its environment cannot be built:{_last_lines(str(error))}"
        return WorkerRaised(Failure("bug", told, str(error)), for_people=True)
    if isinstance(error, ActorUnavailableError):
        return WorkerUnreachable(_short(str(error)))
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        # A Ray error inside the worker: an argument or a payload was lost, not our code.
        kind = "infrastructure" if isinstance(cause, RayError) and cause is not error else classify(cause)
        failure = Failure(kind, f"{type(cause).__name__}: {cause}", str(error))
        return WorkerRaised(failure, for_people=isinstance(cause, VansError))
    return WorkerUnreachable(f"{type(error).__name__}: {_short(str(error))}")


def _short(text: str) -> str:
    """Return Ray's message without the lines of ids that help nobody."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    dull = ("class_name:", "actor_id:", "namespace:", "pid:", "ip:", "name:")
    return " ".join(line for line in lines if not line.startswith(dull))[:400]


def _last_lines(text: str, count: int = 12) -> str:
    """Return the last lines of what an installer wrote, where Ray quotes it, else of ``text``."""
    said = re.split(r"Last \d+ lines of stdout:", text)[-1]
    return "".join(f"\n  {line.strip()}" for line in [line for line in said.splitlines() if line.strip()][-count:])


def _overdue(who: str, what: str, timeout_s: float, hint: str) -> WorkerTimeoutError:
    return WorkerTimeoutError(f"{who} did not answer {what} within {timeout_s:g} s. {hint}".rstrip())


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take the exception of a future that nobody may await any more, so that asyncio does not report it."""
    if not future.cancelled():
        future.exception()
