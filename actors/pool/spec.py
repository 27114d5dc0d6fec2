"""Figures of a pool: plain values, no behaviour beyond arithmetic."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, fields

from actors.pool.state import WorkerState


@dataclass(frozen=True)
class WorkerStats:
    """One worker as the pool sees it."""

    name: str
    state: WorkerState
    version: int | None
    inflight: int
    """Calls under way."""
    requests_done: int
    placed: bool = True
    """False while its process is on its way, perhaps waiting for room in the cluster."""
    node: str = ""
    """IP address of its node, once it has told."""


@dataclass(frozen=True)
class PoolStats:
    """Figures of a pool. Totals count from its start; ``*_s`` are seconds."""

    name: str
    version: int
    target: int
    """Workers the pool should have."""
    ready: int
    workers: tuple[WorkerStats, ...]
    queue_len: int
    """Requests waiting for a worker."""
    oldest_wait_s: float
    """How long the oldest of them has waited (since its last failure, where it is sent again); 0 without any."""
    inflight: int
    """Requests inside workers."""
    done: int
    requests_per_min: float
    """Requests answered in the last minute, or since the start where that is shorter, per minute."""
    queue_wait_s: float
    """From submission (or failure, for a retry) to dispatch; exponential average over requests."""
    service_s: float
    """From dispatch to answer of one call; exponential average over calls."""
    queue_wait_total_s: float
    service_total_s: float
    batch_mean: float
    """Requests per call."""
    busy_ratio: float
    """Share of live workers with a call under way, averaged over about the last 30 s."""
    busy_total_s: float
    """Seconds that workers had a call under way, summed over workers."""
    worker_total_s: float
    """Seconds that workers lived, summed over workers."""
    retries: int
    restarts: int
    failures: dict[str, int] = field(default_factory=dict)
    """Failed requests by class: data, bug, infrastructure (the last are retried)."""

    def metrics(self) -> dict[str, float]:
        """Return the figures as numbers by short name, for a tracker."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class Timings:
    """Single measurements in seconds, for histograms: waits of requests, and times of calls."""

    waits: tuple[float, ...] = ()
    calls: tuple[float, ...] = ()


class Meter:
    """Running figures of a pool; every method takes the time, none asks for it."""

    WEIGHT = 0.1  # of the newest value in an exponential average
    BUSY_WINDOW_S = 30.0
    RATE_WINDOW_S = 60.0
    MOST_TIMINGS = 4096  # kept for whoever takes them; without a taker the oldest are dropped

    def __init__(self) -> None:
        self.queue_wait_s = self.service_s = 0.0
        self.queue_wait_total_s = self.service_total_s = 0.0
        self.waits = self.calls = self.call_requests = self.done = 0
        self.retries = self.restarts = 0
        self.failures = {"data": 0, "bug": 0, "infrastructure": 0}
        self.busy_ratio = self.busy_total_s = self.worker_total_s = 0.0
        self._busy_now: tuple[float, int, int] | None = None  # since when, how many, of how many
        self._began: float | None = None
        self._answers: deque[float] = deque()  # times of the answers of the last minute
        self._waits: deque[float] = deque(maxlen=self.MOST_TIMINGS)
        self._calls: deque[float] = deque(maxlen=self.MOST_TIMINGS)

    def waited(self, seconds: float) -> None:
        """A request left the queue after ``seconds``."""
        self.queue_wait_s = self._average(self.queue_wait_s, seconds, self.waits)
        self.queue_wait_total_s += seconds
        self.waits += 1
        self._waits.append(seconds)

    def served(self, seconds: float, requests: int) -> None:
        """A call with ``requests`` requests was answered after ``seconds``."""
        self.service_s = self._average(self.service_s, seconds, self.calls)
        self.service_total_s += seconds
        self.calls += 1
        self.call_requests += requests
        self._calls.append(seconds)

    def answered(self, now: float) -> None:
        """A request got its answer at ``now``."""
        self.done += 1
        self._answers.append(now)
        self._forget(now)

    def requests_per_min(self, now: float) -> float:
        """Return the rate of answers at ``now``: over the last minute, or since the first figure (at least a second)."""
        self._forget(now)
        if self._began is None:
            return 0.0
        return 60.0 * len(self._answers) / min(self.RATE_WINDOW_S, max(1.0, now - self._began))

    def take_timings(self) -> Timings:
        """Return the single measurements since the last call of this method."""
        taken = Timings(tuple(self._waits), tuple(self._calls))
        self._waits.clear()
        self._calls.clear()
        return taken

    def busy(self, busy: int, alive: int, now: float) -> None:
        """From ``now`` on, ``busy`` of ``alive`` workers have a call under way."""
        self._began = now if self._began is None else self._began
        if self._busy_now is not None:
            since, were_busy, were_alive = self._busy_now
            passed, share = max(0.0, now - since), were_busy / were_alive if were_alive else 0.0
            self.busy_ratio = share + (self.busy_ratio - share) * math.exp(-passed / self.BUSY_WINDOW_S)
            self.busy_total_s += were_busy * passed
            self.worker_total_s += were_alive * passed
        self._busy_now = (now, busy, alive)

    def _forget(self, now: float) -> None:
        while self._answers and self._answers[0] <= now - self.RATE_WINDOW_S:
            self._answers.popleft()

    def _average(self, old: float, new: float, seen: int) -> float:
        weight = max(self.WEIGHT, 1.0 / (seen + 1))  # the plain mean of the first few
        return old + (new - old) * weight
