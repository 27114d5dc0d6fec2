"""The pool's head: who gets which requests when, what is sent again, who is replaced. Pure: no Ray, no tasks, no clock.

Events come in as method calls with the time as an argument; :meth:`Dispatcher.step` returns what is to be done as
commands. The driver (``actors.pool.pool``) executes commands and reports what came of them; it decides nothing.

Rules that the tests hold:

* every ticket ends in exactly one Deliver or Reject;
* a request is sent only to a READY worker, hence only to one that holds the current weights;
* no worker has more than ``max_inflight`` calls or a call of more than ``max_batch`` requests;
* a ticket is sent again at most ``max_retries`` times, at most ``max_restarts`` processes are replaced in an hour.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from actors.failures import Failure, Ok, Outcome
from actors.pool.commands import Command, Deliver, End, Load, Probe, Reject, Send, Start
from actors.pool.errors import PoolFailed, SampleFailed, WorkerBug
from actors.pool.roster import Roster
from actors.pool.settings import PoolSection, Watch
from actors.pool.spec import Meter, PoolStats, WorkerStats
from actors.pool.state import ALIVE, COMING, S, Worker
from actors.pool.waiting import Ticket, Waiting


class Dispatcher:
    """State of one pool: workers, queue, calls, limits. Reports about a process that has been replaced are ignored."""

    def __init__(self, pool: str, settings: PoolSection, watch: Watch) -> None:
        self.pool = pool
        self.settings = settings
        self.watch = watch
        self.version = 0
        self.target = 0
        self.failure: PoolFailed | WorkerBug | None = None
        self.meter = Meter()
        self.last_deaths: list[str] = []
        self._restarts: deque[float] = deque()  # when, within ``restart_window_s``
        self._incarnations: dict[int, int] = {}
        self._roster = Roster(settings.max_inflight, watch.probe_every_s)
        self._queue = Waiting()
        self._tickets: dict[int, Ticket] = {}  # waiting, or inside a worker
        self._calls: dict[int, tuple[Worker, list[Ticket]]] = {}
        self._out: list[Command] = []
        self._next_ticket = self._next_call = 0

    @property
    def workers(self) -> list[Worker]:
        """All workers, in the order in which they joined."""
        return self._roster.workers

    @property
    def resting(self) -> bool:
        """Nothing is asked of workers but pings: no requests, no weights, no new processes."""
        return self._roster.resting

    @resting.setter
    def resting(self, resting: bool) -> None:
        self._roster.resting = resting

    # --- requests

    def submit(self, now: float) -> int:
        """Queue a request; return its ticket."""
        if self.failure is not None:
            raise self.failure
        ticket = Ticket(self._next_ticket, now)
        self._next_ticket += 1
        self._tickets[ticket.id] = ticket
        self._queue.append(ticket)
        return ticket.id

    def forget(self, ticket: int) -> None:
        """The submitter has gone: drop the ticket if it waits; if it is inside a worker, do not send it again."""
        held = self._tickets.pop(ticket, None)
        if held is not None:
            held.wanted = False
            self._queue.discard(held)

    def answered(self, call: int, outcomes: Sequence[Outcome], now: float) -> None:
        """A worker answered ``call`` with one outcome per ticket."""
        if call not in self._calls:
            return
        worker, tickets = self._calls.pop(call)
        self._roster.touch(worker)
        if len(outcomes) != len(tickets):
            fault = Failure("bug", f"process() answered {len(outcomes)} of {len(tickets)} requests")
            outcomes = [fault] * len(tickets)
        self.meter.served(now - worker.calls.pop(call), len(tickets))
        worker.last_heard = now
        struck = None
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            if isinstance(outcome, Ok):
                self.meter.answered(now)
                worker.requests_done += 1
                self._deliver(ticket, outcome.value)
                continue
            self.meter.failures[outcome.kind] += 1
            if outcome.kind == "infrastructure":
                struck = outcome.message
                self._again(ticket, f"{worker.name}: {outcome.message}", worker.name, now)
            elif outcome.kind == "data":
                self._reject(ticket, SampleFailed(f"{worker.name}: {outcome.message}"))
            else:
                told = f"{worker.name}: {outcome.message}"
                self._reject(ticket, PoolFailed(told) if outcome.for_people else WorkerBug(told, outcome.traceback))
        if struck is None:
            worker.strikes = 0
        else:
            self._strike(worker, struck, now)

    # --- workers

    def placed(self, name: str) -> None:
        """The cluster had room for ``name``: its process runs."""
        worker = self._roster.find(name)
        if worker is not None:
            worker.placed = True

    def unplaced(self, name: str, reason: str) -> None:
        """``name`` has waited ``start_timeout_s`` for room. The pool goes on with the others; without any, it fails."""
        if self._roster.find(name) is not None and not any(worker.placed for worker in self.workers):
            self.fail(PoolFailed(f"pool {self.pool}: no worker could be placed. {reason}"))

    def started(self, name: str, now: float) -> None:
        """Worker ``name`` has loaded its model."""
        worker = self._roster.find(name)
        if worker is None:
            return
        worker.errand = None
        worker.last_heard = now
        if worker.state in COMING:
            worker.started()

    def loaded(self, name: str, version: int, now: float) -> None:
        """Worker ``name`` holds weights ``version``."""
        worker = self._roster.find(name)
        if worker is None:
            return
        worker.errand = None
        worker.last_heard = now
        if worker.state is S.STALE:
            worker.loaded(version, self.version)

    def probed(self, name: str, now: float) -> None:
        """Worker ``name`` answered a ping."""
        worker = self._roster.find(name)
        if worker is None:
            return
        worker.errand = None
        worker.last_heard = now
        if worker.state is S.SUSPECT:
            worker.move(S.STALE)

    def suspected(self, name: str, reason: str, now: float, call: int | None = None) -> None:
        """Worker ``name`` could not be reached, in ``call`` or (None) on its errand, but may be alive."""
        worker = self._roster.find(name)
        if worker is None:
            return
        if call is None:
            worker.errand = None
        elif call in worker.calls:
            del worker.calls[call]
            for ticket in self._calls.pop(call)[1]:
                self.meter.failures["infrastructure"] += 1
                self._again(ticket, f"{name}: {reason}", name, now)
        self._strike(worker, reason, now)

    def hold(self, name: str, calls: int) -> None:
        """``calls`` more (or fewer) calls beside requests are under way on ``name``."""
        worker = self._roster.find(name)
        if worker is not None:
            worker.side_calls = max(0, worker.side_calls + calls)

    def struck(self, name: str, reason: str, now: float) -> None:
        """Worker ``name`` could not be reached by such a call."""
        worker = self._roster.find(name)
        if worker is not None:
            self._strike(worker, reason, now)

    def died(self, name: str, reason: str, now: float) -> None:
        """Worker ``name`` is gone, or must go: its calls are sent again, its slot gets a new process."""
        worker = self._roster.find(name)
        if worker is None or worker.state is S.DEAD:
            return
        self.last_deaths = [*self.last_deaths[-4:], f"{name}: {reason}"]
        self._out.append(End(name, healthy=False))
        for call in list(worker.calls):
            for ticket in self._calls.pop(call)[1]:
                self.meter.failures["infrastructure"] += 1
                self._again(ticket, f"{name}: {reason}", name, now)
        worker.calls.clear()
        worker.errand = None
        if worker.state is S.RETIRED:
            self._roster.remove(worker)
            return
        worker.move(S.DEAD)
        worker.failed_starts += 1
        while self._restarts and self._restarts[0] <= now - self.watch.restart_window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self.settings.max_restarts:
            self.fail(PoolFailed(self._too_many_restarts()))
            return
        self._restarts.append(now)
        self.meter.restarts += 1
        wait = 0.0
        if worker.failed_starts > 1:
            wait = min(self.watch.max_backoff_s, self.watch.backoff_s * 2.0 ** (worker.failed_starts - 2))
        worker.restart(now + wait)
        self._roster.renamed(worker, name)
        self._incarnations[worker.slot] = worker.incarnation

    def publish(self, version: int) -> None:
        """``version`` is current from now on: no request waiting or submitted later is served by another."""
        self.version = version
        for worker in self.workers:
            if worker.state is S.READY and worker.version != version:
                worker.move(S.STALE)
                self._roster.touch(worker)

    def resize(self, target: int, leaving: str = "") -> None:
        """Have ``target`` workers: start more, or retire some (``leaving`` first, those not serving yet, then the highest slots)."""
        if target < 1:
            raise ValueError(f"pool {self.pool}: {target} workers asked for; a pool has at least 1")
        self.target = target
        active = [w for w in self.workers if w.state is not S.RETIRED]
        taken = {w.slot for w in active}
        for slot in range(target + len(active)):
            if len(active) >= target:
                break
            if slot not in taken:
                self._incarnations[slot] = self._incarnations.get(slot, 0) + 1
                active.append(Worker(self.pool, slot, self._incarnations[slot]))
                self._roster.add(active[-1])
        order = sorted(active, key=lambda w: (w.name != leaving, w.state in ALIVE, -w.slot))
        for worker in order[: len(active) - target]:
            worker.move(S.RETIRED)
            self._roster.touch(worker)

    def fail(self, error: PoolFailed | WorkerBug) -> None:
        """End the pool: every ticket is rejected with ``error``, every worker is ended."""
        if self.failure is not None:
            return
        self.failure = error
        tickets = [t for _, call in self._calls.values() for t in call] + self._queue.clear()
        self._calls = {}
        for ticket in sorted(tickets, key=lambda t: t.id):
            self._reject(ticket, error)
        self._out += [End(worker.name, healthy=False) for worker in self.workers]
        self._roster.clear()

    # --- what is to be done

    def step(self, now: float) -> list[Command]:
        """Return all that is to be done at ``now``."""
        for worker in self._roster.due(now):
            self._errands(worker, now)
            self._roster.settle(worker)
        self._dispatch(now)
        self.meter.busy(self._roster.busy, self._roster.alive, now)
        out, self._out = self._out, []
        return out

    def wake_at(self, now: float) -> float | None:
        """Return the time at which ``step`` has to be called if nothing happens before, or None."""
        times = [self._roster.wake_at()]
        if self._queue and self._roster.free and not self.resting:
            times.append(self._queue.oldest() + self.settings.max_wait_s)
        return min((time for time in times if time is not None and time > now), default=None)

    def stats(self, now: float) -> PoolStats:
        """Return the pool's figures at ``now``."""
        m = self.meter
        alive = [w for w in self.workers if w.state in ALIVE]
        m.busy(sum(bool(w.calls) for w in alive), len(alive), now)
        return PoolStats(
            name=self.pool,
            version=self.version,
            target=self.target,
            ready=sum(w.state is S.READY for w in self.workers),
            workers=tuple(
                WorkerStats(w.name, w.state, w.version, len(w.calls), w.requests_done, w.placed)
                for w in sorted(self.workers, key=lambda w: (w.slot, w.incarnation))
            ),
            queue_len=len(self._queue),
            oldest_wait_s=now - self._queue.oldest() if self._queue else 0.0,
            inflight=sum(len(tickets) for _, tickets in self._calls.values()),
            done=m.done,
            requests_per_min=m.requests_per_min(now),
            queue_wait_s=m.queue_wait_s,
            service_s=m.service_s,
            queue_wait_total_s=m.queue_wait_total_s,
            service_total_s=m.service_total_s,
            batch_mean=m.call_requests / m.calls if m.calls else 0.0,
            busy_ratio=m.busy_ratio,
            busy_total_s=m.busy_total_s,
            worker_total_s=m.worker_total_s,
            retries=m.retries,
            restarts=m.restarts,
            failures=dict(m.failures),
        )

    # --- inside

    def _errands(self, worker: Worker, now: float) -> None:
        if worker.state is S.RETIRED and not worker.calls and not worker.side_calls and worker.errand != "load":
            self._roster.remove(worker)  # one that still starts, perhaps waits for room, is not waited for
            self._out.append(End(worker.name, healthy=worker.seen))
            return
        if worker.errand is not None or (self.resting and worker.state in COMING):
            return
        if worker.state in COMING and now >= worker.not_before:
            worker.errand = "start"
            self._out.append(Start(worker.name))
        elif worker.calls or worker.side_calls:
            return  # everything below waits until the worker is idle: its calls finish on the weights they began with
        elif worker.state is S.STALE and not self.resting:
            worker.errand = "load"
            self._out.append(Load(worker.name, self.version))
        elif worker.state is S.SUSPECT or (self._roster.waits(worker) and now >= self._roster.probe_at(worker)):
            worker.errand = "probe"
            self._out.append(Probe(worker.name))

    def _dispatch(self, now: float) -> None:
        """Send full batches at once, others when their oldest request has waited ``max_wait_s``.

        Requests are spread evenly over the free workers, the least busy first.
        """
        while self._queue and self._roster.free and not self.resting:
            waiting = len(self._queue)
            if waiting < self.settings.max_batch and now < self._queue.oldest() + self.settings.max_wait_s:
                return
            size = min(self.settings.max_batch, math.ceil(waiting / self._roster.free))
            asked: list[Worker] = []
            for worker in self._roster.take_free():
                asked.append(worker)
                batch = self._queue.take(size, worker.name, others=self._roster.alive > 1)
                if batch:
                    self._send(worker, batch, now)
                if not self._queue:
                    break
            for worker in asked:
                self._roster.settle(worker)
            if len(self._queue) == waiting:
                return  # what waits avoids every free worker; another one is on its way

    def _send(self, worker: Worker, batch: list[Ticket], now: float) -> None:
        self._next_call += 1
        self._calls[self._next_call] = (worker, batch)
        worker.calls[self._next_call] = now
        worker.last_sent = self._next_call
        for ticket in batch:
            self.meter.waited(now - ticket.since)
        self._out.append(Send(self._next_call, worker.name, tuple(ticket.id for ticket in batch)))

    def _again(self, ticket: Ticket, reason: str, worker: str, now: float) -> None:
        if not ticket.wanted:
            return
        ticket.reasons.append(reason)
        if ticket.retries >= self.settings.max_retries:
            tries = "\n".join(f"  {n}. {text}" for n, text in enumerate(ticket.reasons, 1))
            error = PoolFailed(
                f"pool {self.pool}: a request failed {len(ticket.reasons)} times for reasons of the machines "
                f"(max_retries={self.settings.max_retries}):\n{tries}"
            )
            self._reject(ticket, error)
            return
        ticket.retries += 1
        ticket.avoid = worker
        ticket.since = now
        self.meter.retries += 1
        self._queue.send_again(ticket)

    def _strike(self, worker: Worker, reason: str, now: float) -> None:
        worker.strikes += 1
        if worker.strikes >= self.watch.max_strikes:
            self.died(worker.name, f"{worker.strikes} failures in a row, the last: {reason}", now)
        elif worker.state in (S.READY, S.STALE):
            worker.move(S.SUSPECT)

    def _too_many_restarts(self) -> str:
        deaths = "\n".join(f"  {text}" for text in self.last_deaths)
        return (
            f"pool {self.pool}: workers died {len(self._restarts) + 1} times within {self.watch.restart_window_s / 60:.0f} min "
            f"and max_restarts={self.settings.max_restarts}; the last:\n{deaths}"
        )

    def _deliver(self, ticket: Ticket, value: object) -> None:
        self._tickets.pop(ticket.id, None)
        self._out.append(Deliver(ticket.id, value))

    def _reject(self, ticket: Ticket, error: Exception) -> None:
        self._tickets.pop(ticket.id, None)
        self._out.append(Reject(ticket.id, error))
