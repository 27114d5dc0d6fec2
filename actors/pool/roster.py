"""The workers of a pool, indexed: by name, who is free, when the next one is to be looked at. Pure.

A pool of hundreds of workers has thousands of events a second, each of which concerns one worker. So whoever changes a worker
says so (``touch``), and only those are looked at again; the indices follow in ``settle``.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from actors.pool.state import ALIVE, COMING, S, Worker

_Key = tuple[int, int, int]  # calls under way, number of the last call, slot: the least busy first


class Roster:
    """Workers of one pool; ``max_inflight`` as in ``PoolSection``, ``probe_every_s`` as in ``Watch``."""

    def __init__(self, max_inflight: int, probe_every_s: float) -> None:
        self.workers: list[Worker] = []
        self.alive = 0
        self.busy = 0
        """Live workers with a call under way."""
        self._max_inflight, self._probe_every_s = max_inflight, probe_every_s
        self._resting = False
        self._names: dict[str, Worker] = {}
        self._order: dict[Worker, int] = {}  # by age, and so in the list
        self._touched: set[Worker] = set()
        self._counted: dict[Worker, tuple[bool, bool]] = {}  # alive, busy
        self._free: dict[Worker, _Key] = {}
        # Heaps; the number in the middle, never the same, decides between equals.
        self._by_load: list[tuple[_Key, int, Worker]] = []  # an entry counts while _free has the same key
        self._timers: list[tuple[float, int, Worker]] = []  # never later than when the worker is due
        self._entries = itertools.count()
        self._pending: dict[Worker, float] = {}  # the earliest entry there
        self._next = 0

    @property
    def resting(self) -> bool:
        """See ``Dispatcher.resting``."""
        return self._resting

    @resting.setter
    def resting(self, resting: bool) -> None:
        self._resting = resting
        self._touched.update(self.workers)

    # --- who is here

    def add(self, worker: Worker) -> None:
        """A worker joins."""
        self.workers.append(worker)
        self._names[worker.name] = worker
        self._order[worker] = self._next
        self._next += 1
        self._touched.add(worker)

    def remove(self, worker: Worker) -> None:
        """A worker leaves for good."""
        self.workers.remove(worker)
        self._names.pop(worker.name, None)
        for index in (self._order, self._free, self._pending):
            index.pop(worker, None)
        self._touched.discard(worker)
        self._count(worker, False, False)
        self._counted.pop(worker, None)

    def clear(self) -> None:
        """All leave."""
        for worker in list(self.workers):
            self.remove(worker)

    def renamed(self, worker: Worker, before: str) -> None:
        """Another process has taken the slot."""
        self._names.pop(before, None)
        self._names[worker.name] = worker
        self._touched.add(worker)

    def find(self, name: str) -> Worker | None:
        """Return the worker of that name; it is taken to be changed by whoever asks."""
        worker = self._names.get(name)
        if worker is not None:
            self._touched.add(worker)
        return worker

    def touch(self, worker: Worker) -> None:
        """``worker`` has changed, or is about to."""
        self._touched.add(worker)

    # --- who is to be looked at

    def due(self, now: float) -> list[Worker]:
        """Return the workers that have changed, or whose time has come; they are to be settled."""
        while self._timers and self._timers[0][0] <= now:
            _, _, worker = heapq.heappop(self._timers)
            self._pending.pop(worker, None)
            if worker in self._order:
                self._touched.add(worker)
        found = sorted((w for w in self._touched if w in self._order), key=self._order.__getitem__)
        self._touched = set()
        return found

    def wake_at(self) -> float | None:
        """Return when the next worker is due if nothing happens before."""
        while self._timers:
            time, _, worker = self._timers[0]
            right = self._due_at(worker) if worker in self._order else None
            if right is not None and right <= time:
                return time
            heapq.heappop(self._timers)
            self._pending.pop(worker, None)
            if right is not None:
                self._remind(worker, right)
        return None

    def waits(self, worker: Worker) -> bool:
        """Whether nothing but a ping would tell that ``worker`` is gone; in a resting pool weights wait too."""
        return worker.state is S.READY or (self._resting and worker.state is S.STALE)

    def probe_at(self, worker: Worker) -> float:
        """Return when ``worker`` is pinged if it is not heard of before."""
        return worker.last_heard + self._probe_every_s

    def settle(self, worker: Worker) -> None:
        """Bring the indices up to date with ``worker``."""
        if worker not in self._order:
            return
        self._count(worker, worker.state in ALIVE, bool(worker.calls))
        if worker.state is S.READY and worker.errand is None and len(worker.calls) < self._max_inflight:
            key = (len(worker.calls), worker.last_sent, worker.slot)
            if self._free.get(worker) != key:
                self._free[worker] = key
                heapq.heappush(self._by_load, (key, next(self._entries), worker))
        else:
            self._free.pop(worker, None)
        due = self._due_at(worker)
        if due is not None and due < self._pending.get(worker, float("inf")):
            self._remind(worker, due)
        if len(self._by_load) > 4 * len(self._free) + 64:  # entries of the past, too deep in the heap to have come up
            self._by_load = [(key, next(self._entries), w) for w, key in self._free.items()]
            heapq.heapify(self._by_load)

    # --- who is free

    @property
    def free(self) -> int:
        """How many workers could have a call now."""
        return len(self._free)

    def take_free(self) -> Iterator[Worker]:
        """Yield the free workers, the least busy first; each has to be settled afterwards to be free again."""
        while self._by_load:
            key, _, worker = heapq.heappop(self._by_load)
            if self._free.get(worker) == key:
                del self._free[worker]
                yield worker

    # --- inside

    def _due_at(self, worker: Worker) -> float | None:
        if worker.errand is not None:
            return None
        if worker.state in COMING:
            return None if self._resting else worker.not_before
        if self.waits(worker) and not worker.calls and not worker.side_calls:
            return self.probe_at(worker)
        return None

    def _remind(self, worker: Worker, time: float) -> None:
        self._pending[worker] = time
        heapq.heappush(self._timers, (time, next(self._entries), worker))

    def _count(self, worker: Worker, alive: bool, busy: bool) -> None:
        was_alive, was_busy = self._counted.get(worker, (False, False))
        busy = busy and alive
        self.alive += alive - was_alive
        self.busy += busy - was_busy
        self._counted[worker] = (alive, busy)
