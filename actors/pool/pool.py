"""The pool that the pipeline uses: Ray actors behind ``submit``. It does what ``dispatch`` decides and reports back.

Responsible for actors, deadlines, futures and logging; not for decisions (``dispatch``), nor for what workers compute.
One event loop owns a pool; its methods are called from that loop only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import traceback
from collections.abc import Callable
from typing import Any

from actors.pool import commands
from actors.pool.dispatch import Dispatcher
from actors.pool.errors import PoolFailed, WorkerBug
from actors.pool.protocol import WorkerInfo
from actors.pool.remote import RayTransport, Transport, WorkerGone, WorkerRaised, WorkerUnreachable
from actors.pool.settings import PoolSection, Watch
from actors.pool.spec import PoolStats, Timings
from actors.pool.state import ALIVE, COMING, S
from actors.pool.tasks import WorkerTasks
from cluster.errors import WorkerTimeoutError
from cluster.resources import amounts, found_room, view

log = logging.getLogger(__name__)

RECONSIDER_S = 10.0
"""Between looks at whether a worker that waits for room would find it elsewhere; Ray's own moves come first."""

_TROUBLE = (WorkerTimeoutError, WorkerGone, WorkerUnreachable, WorkerRaised)


class WorkerPool:
    """An elastic pool of Ray actors that follow ``actors.pool.protocol.Worker``.

    ``make_worker(name)`` creates the actor of that name and returns its handle at once (``.options(...).remote(...)``);
    it runs in a thread. ``cluster.names.slot_of(name)`` is the slot, which ``Placement.options`` turns into a bundle.
    ``reconsider(name)``, also in a thread, says of a worker that waits for room whether ``make_worker`` would now look
    for it elsewhere (``Placement.reconsider``); it is then made anew. ``transport`` is how workers are reached: as Ray actors.

    Requests are idempotent: one whose worker died, hung or failed for a reason of its machine is sent again to another
    worker, and gives the same result because it carries its own seed. A result may then be made with newer weights than
    were current at its submission, if weights were set in between; results carry their version.
    """

    def __init__(
        self,
        name: str,
        make_worker: Callable[[str], Any],
        settings: PoolSection,
        watch: Watch | None = None,
        *,
        reconsider: Callable[[str], bool] = lambda name: False,
        transport: Transport | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.watch = watch or Watch()
        self._make_worker = make_worker
        self._reconsider = reconsider
        self._core = Dispatcher(name, settings, self.watch)
        self._payload: list[Any] | None = None
        self._requests: dict[int, Any] = {}
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._handles: dict[str, Any] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self._tasks = WorkerTasks(name, self._pump_soon, self._own_bug)
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._pump_due = False
        self._closed = False
        self._transport: Transport = RayTransport(name) if transport is None else transport

    # --- what the pipeline calls

    async def start(self) -> None:
        """Start all workers together; return when all serve (or, after ``start_timeout_s``, those that found room).

        When the pool cannot start it is closed, and raises PoolFailed (machines, or a VansError in the worker's ``setup``) or
        WorkerBug (any other error there).
        """
        try:
            await self.resize(self.settings.workers, wait=True)
        except BaseException:
            await self.close()
            raise

    async def submit(self, request: Any) -> Any:
        """Return the answer to ``request``.

        Raises:
            SampleFailed: the request can never succeed.
            WorkerBug: our code raised in the worker; carries its traceback.
            PoolFailed: infrastructure failed more often than the limits allow, or the pool is closed.
        """
        if self._core.target == 0:
            raise PoolFailed(f"pool {self.name} has not been started")
        ticket = self._core.submit(self._now())
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests[ticket], self._futures[ticket] = request, future
        self._pump_soon()
        try:
            return await future
        finally:
            if self._futures.pop(ticket, None) is not None:  # the submitter was cancelled
                self._core.forget(ticket)
                self._requests.pop(ticket, None)

    async def set_weights(self, version: int, payload: list[Any] | None) -> None:
        """Make ``version`` current; return when every worker that was alive has loaded it (or has been replaced).

        Calls under way finish on the weights they began with; nothing submitted after this call begins is served by
        older ones. ``payload`` (a list of object refs; None is the base weights) is kept for workers that start later.
        """
        if self._core.failure is not None:
            raise self._core.failure
        self._payload = payload
        self._core.publish(version)
        self._pump_soon()
        alive = {worker.name for worker in self._core.workers if worker.state in ALIVE}
        await self._until(
            lambda: (
                not any(w.name in alive and w.state in ALIVE and w.version != version for w in self._core.workers)
                or self._core.version != version
            )
        )

    async def resize(self, workers: int, *, wait: bool = False, leaving: str = "") -> None:
        """Have ``workers`` workers. New ones start beside those that serve; leaving ones, ``leaving`` first, finish their calls.

        ``wait``: return only when all of them serve, or have waited for room for ``start_timeout_s``.
        """
        if self._core.failure is not None:
            raise self._core.failure
        self._core.resize(workers, leaving)
        self._pump_soon()
        if wait:
            patience = self._now() + self.settings.start_timeout_s
            timer = asyncio.get_running_loop().call_at(patience + 0.1, self._pump_soon)
            try:
                await self._until(
                    lambda: all(
                        worker.state in (S.READY, S.RETIRED) or (not worker.placed and self._now() > patience)
                        for worker in self._core.workers
                    )
                )
            finally:
                timer.cancel()

    async def rest(self) -> None:
        """Have every worker give up its device's memory until :meth:`wake`; returns when all have.

        Calls under way finish first. Until then requests wait, and so do weights and workers to be started or replaced; pings
        go on. A worker takes the memory back when it is first asked for something that needs it.
        """
        if self._core.failure is not None:
            raise self._core.failure
        self._core.resting = True
        await self._until(lambda: not any(w.calls or w.errand == "load" for w in self._core.workers))
        await self.call_all("rest")

    def wake(self) -> None:
        """Let requests, weights and new workers through again; without a :meth:`rest` before it does nothing."""
        self._core.resting = False
        self._pump_soon()

    def receivers(self) -> int:
        """Return how many processes will receive weights that are set now (``receivers`` of each live worker)."""
        return self.settings.receivers * sum(worker.state in ALIVE for worker in self._core.workers)

    def stats(self) -> PoolStats:
        """Return the pool's figures."""
        stats = self._core.stats(self._now())
        nodes = {name: info.node for name, info in self._infos.items()}
        workers = tuple(dataclasses.replace(worker, node=nodes.get(worker.name, "")) for worker in stats.workers)
        return dataclasses.replace(stats, workers=workers)

    def take_timings(self) -> Timings:
        """Return the waits and call times since the last call of this method."""
        return self._core.meter.take_timings()

    async def waiting_for_room(self) -> list[str]:
        """Return the workers for whose process the cluster has no room yet; asks the cluster, and only where there may be one."""
        loop = asyncio.get_running_loop()
        # Not RETIRED: one that leaves before it was placed waits for nothing any more.
        waiting = [w.name for w in self._core.workers if w.state in COMING and not w.placed]
        coming = {name: self._handles[name] for name in waiting if name in self._handles}
        return [name for name, handle in coming.items() if not await loop.run_in_executor(None, found_room, handle)]

    def infos(self) -> dict[str, WorkerInfo]:
        """Return what the workers told of themselves, by name."""
        return {name: info for name, info in self._infos.items() if name in self._handles}

    async def call_all(self, method: str, *args: Any, timeout_s: float | None = None) -> dict[str, Any]:
        """Call ``method`` on every live worker and return the answers by worker name.

        A worker that dies or hangs meanwhile is replaced and missing from the answers; one whose method raises is a
        WorkerBug.
        """
        names = [worker.name for worker in self._core.workers if worker.state in ALIVE]
        answers = await asyncio.gather(*(self._call_one(name, method, args, timeout_s) for name in names))
        return {name: answer[0] for name, answer in zip(names, answers, strict=True) if answer}

    async def close(self) -> None:
        """End all workers; whoever still waits for an answer gets PoolFailed. May be called again."""
        if self._closed:
            return
        self._closed = True
        healthy = [w.name for w in self._core.workers if w.state in (S.READY, S.STALE) and not w.calls]
        self._core.fail(PoolFailed(f"pool {self.name} is closed"))
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.end()
        await asyncio.gather(*(self._retire(name) for name in healthy))
        self._pump()
        for name in list(self._handles):
            self._kill(name)
        self._transport.close()

    async def __aenter__(self) -> WorkerPool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- executing the dispatcher's commands

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _pump_soon(self) -> None:
        """Pump once after the callbacks of this turn, so that requests submitted together can share a batch."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        for command in self._core.step(self._now()):
            self._execute(command)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake = self._core.wake_at(self._now())
        if wake is not None and not self._closed:
            self._timer = asyncio.get_running_loop().call_at(wake, self._pump_soon)
        for predicate, future in self._waiters:
            if not future.done() and (self._core.failure is not None or predicate()):
                future.set_result(None)

    def _execute(self, command: commands.Command) -> None:
        match command:
            case commands.Start(name):
                self._tasks.spawn(name, self._start_worker(name))
            case commands.Load(name, version):
                self._tasks.spawn(name, self._load(name, version, self._payload))
            case commands.Probe(name):
                self._tasks.spawn(name, self._probe(name))
            case commands.Send(call, name, tickets):
                self._tasks.spawn(name, self._process(call, name, [self._requests.get(ticket) for ticket in tickets]))
            case commands.End(name, healthy):
                self._end(name, healthy)
            case commands.Deliver(ticket, value):
                self._settle(ticket, lambda future: future.set_result(value))
            case commands.Reject(ticket, error):
                self._settle(ticket, lambda future: future.set_exception(error))

    def _settle(self, ticket: int, put: Callable[[asyncio.Future[Any]], None]) -> None:
        self._requests.pop(ticket, None)
        future = self._futures.pop(ticket, None)
        if future is not None and not future.done():
            put(future)

    def _own_bug(self, name: str, error: BaseException) -> None:
        log.error("pool %s: its own code failed at worker %s", self.name, name, exc_info=error)
        self._core.fail(WorkerBug(f"pool {self.name}, at worker {name}: {type(error).__name__}: {error}"))

    async def _until(self, predicate: Callable[[], bool]) -> None:
        """Wait until ``predicate`` holds; raise when the pool fails first. Deadlines of the workers bound the wait."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (predicate, future)
        self._waiters.append(waiter)
        self._pump_soon()
        try:
            await future
        finally:
            self._waiters.remove(waiter)
        if self._core.failure is not None:
            raise self._core.failure

    # --- one coroutine for each kind of command

    async def _start_worker(self, name: str) -> None:
        try:
            await self._placement(name)
            self._core.placed(name)
            info = await self._ask(name, "setup", timeout_s=self.settings.start_timeout_s)
        except _TROUBLE as error:
            self._report(name, error, "setup", fatal=True)
            return
        if isinstance(info, WorkerInfo):
            self._infos[name] = info
        log.info("pool %s: %s has started on %s", self.name, self._who(name), getattr(info, "device", "?"))
        self._core.started(name, self._now())

    async def _placement(self, name: str) -> None:
        """Create ``name`` and wait for room, however long, as long as others can work meanwhile."""
        loop = asyncio.get_running_loop()
        began, patience = self._now(), self.settings.start_timeout_s
        ready = await self._make(name)
        while self._core.failure is None:
            done, _ = await asyncio.wait({ready}, timeout=min(patience, began + patience - self._now(), RECONSIDER_S))
            if done:
                ready.result()
                return
            if await loop.run_in_executor(None, self._looks_elsewhere, name):
                log.warning("pool %s: worker %s finds no room where it belongs; it looks elsewhere", self.name, name)
                self._kill(name)
                ready = await self._make(name)
            if self._now() >= began + patience:
                patience += self.settings.start_timeout_s
                cluster = await loop.run_in_executor(None, view)
                waited, free = self._now() - began, amounts(cluster.free)
                reason = f"Worker {name} has waited {waited:.0f} s for room; free in the cluster: {free}"
                log.warning("pool %s: %s", self.name, reason)
                self._core.unplaced(name, reason)
                self._pump_soon()
        raise WorkerGone("the pool failed while it waited for resources")

    def _looks_elsewhere(self, name: str) -> bool:
        try:
            return self._reconsider(name)
        except Exception as error:  # noqa: BLE001 - Ray's tables are in flux when a node dies; it is asked again soon
            log.warning("pool %s: whether %s has a place could not be found out: %s", self.name, name, error)
            return False

    async def _make(self, name: str) -> asyncio.Future[Any]:
        """Create the actor ``name``; return what is done when its process runs."""
        try:
            handle = await self._transport.make(self._make_worker, name)
        except Exception as error:  # the caller's code; it ends the pool and reaches every submitter
            text = "".join(traceback.format_exception(error))
            self._core.fail(WorkerBug(f"pool {self.name}: worker {name} could not be created: {error!r}", text))
            raise WorkerGone("it could not be created") from error
        self._handles[name] = handle
        ready = self._transport.ready(handle)
        ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        return ready

    async def _load(self, name: str, version: int, payload: list[Any] | None) -> None:
        try:
            loaded = await self._ask(name, "load_weights", version, payload, timeout_s=self.settings.start_timeout_s)
        except _TROUBLE as error:
            self._report(name, error, f"load_weights({version})", fatal=True)
            return
        if loaded != version:
            self._core.fail(WorkerBug(f"{self._who(name)}: load_weights({version}) returned {loaded!r}"))
            return
        self._core.loaded(name, version, self._now())

    async def _probe(self, name: str) -> None:
        try:
            await self._ask(name, "ping", timeout_s=self.watch.probe_timeout_s)
        except WorkerRaised as error:  # the engine behind a live process is gone
            self._core.died(name, f"ping raised {error}", self._now())
        except _TROUBLE as error:
            self._report(name, error, "ping", fatal=False)
        else:
            self._core.probed(name, self._now())

    async def _process(self, call: int, name: str, requests: list[Any]) -> None:
        try:
            outcomes = await self._ask(name, "process", requests, timeout_s=self.settings.request_timeout_s)
        except WorkerRaised as error:
            self._core.answered(call, [error.failure] * len(requests), self._now())
        except _TROUBLE as error:
            self._report(name, error, f"process of {len(requests)} requests", fatal=False, call=call)
        else:
            self._core.answered(call, outcomes, self._now())

    async def _call_one(self, name: str, method: str, args: tuple[Any, ...], timeout_s: float | None) -> list[Any]:
        """Return a list of the one answer, or an empty list if the worker gave none."""
        self._core.hold(name, 1)
        try:
            return [await self._ask(name, method, *args, timeout_s=timeout_s or self.settings.request_timeout_s)]
        except WorkerRaised as error:
            raise WorkerBug(f"{self._who(name)}: {method}() raised {error}", error.failure.traceback) from None
        except WorkerUnreachable as error:
            self._core.struck(name, str(error), self._now())
            return []
        except _TROUBLE as error:
            self._report(name, error, method, fatal=False)
            return []
        finally:
            self._core.hold(name, -1)
            self._pump_soon()

    def _report(self, name: str, error: Exception, what: str, *, fatal: bool, call: int | None = None) -> None:
        """Tell the dispatcher what happened to ``name``. ``fatal``: an exception of our code there ends the pool."""
        now = self._now()
        log.warning("pool %s: %s failed at %s: %s", self.name, self._who(name), what, error)
        match error:
            case WorkerRaised() if fatal and error.for_people:
                self._core.fail(PoolFailed(f"pool {self.name}: {what} of worker {name} failed. {error}"))
            case WorkerRaised() if fatal and error.failure.kind != "infrastructure":
                self._core.fail(WorkerBug(f"{self._who(name)}: {what} raised {error}", error.failure.traceback))
            case WorkerUnreachable():
                self._core.suspected(name, str(error), now, call)
            case _:
                self._core.died(name, str(error), now)

    async def _ask(self, name: str, method: str, *args: Any, timeout_s: float) -> Any:
        handle = self._handles.get(name)
        if handle is None:
            raise WorkerGone("it was ended")
        return await self._transport.ask(handle, method, args, timeout_s=timeout_s, who=self._who(name))

    def _who(self, name: str) -> str:
        info = self._infos.get(name)
        where = f"on node {info.node}, pid {info.pid}" if info else "not yet set up"
        return f"worker {name} of pool {self.name} ({where})"

    # --- ending workers

    def _end(self, name: str, healthy: bool) -> None:
        if not healthy:
            self._tasks.cancel(name)
            self._kill(name)
        else:
            self._tasks.spawn(name, self._retire(name))

    async def _retire(self, name: str) -> None:
        """Let a healthy worker close what it holds (an engine's processes), where it has a ``shutdown``, and end it."""
        try:
            if hasattr(self._handles.get(name), "shutdown"):
                await self._ask(name, "shutdown", timeout_s=self.watch.probe_timeout_s)
        except _TROUBLE as error:
            log.warning("pool %s: %s did not shut down: %s", self.name, self._who(name), error)
        self._kill(name)

    def _kill(self, name: str) -> None:
        handle = self._handles.pop(name, None)
        self._infos.pop(name, None)
        if handle is not None:
            self._transport.kill(handle)
