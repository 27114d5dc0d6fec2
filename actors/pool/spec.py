"""Limits of a pool, and its figures: plain values, no behaviour beyond arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from actors.pool.state import WorkerState


@dataclass(frozen=True)
class PoolSpec:
    """Size and limits of one pool. Times are seconds."""

    workers: int
    max_batch: int = 16
    """Most requests in one call of a worker."""
    max_inflight: int = 1
    """Calls a worker may have at once; more than 1 only helps actors that answer concurrently or prefetch."""
    max_wait_s: float = 0.02
    """Longest a request waits for its batch to fill while a worker is free."""
    start_timeout_s: float = 300.0
    """Deadline of ``setup`` and of ``load_weights``; the longest a pool without a live worker waits for resources."""
    request_timeout_s: float = 300.0
    """Deadline of one ``process`` call, the wait in the actor's own queue included."""
    max_retries: int = 3
    """Times a request is sent again after infrastructure failures."""
    max_restarts: int = 20
    """Worker replacements in the pool's life before it fails."""
    probe_every_s: float = 10.0
    """An idle worker that has not been heard of for this long is pinged."""
    probe_timeout_s: float = 60.0
    """Deadline of a ping, and of a worker's ``shutdown``."""
    max_strikes: int = 3
    """Infrastructure failures in a row after which a worker that still answers pings is replaced."""
    backoff_s: float = 0.5
    """Wait before the second restart in a row of a slot that never became ready; doubles, up to ``max_backoff_s``."""
    max_backoff_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("workers", "max_batch", "max_inflight", "max_strikes"):
            if getattr(self, name) < 1:
                raise ValueError(f"PoolSpec.{name}={getattr(self, name)}: must be at least 1")
        for name in ("start_timeout_s", "request_timeout_s", "probe_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"PoolSpec.{name}={getattr(self, name)}: every wait needs a deadline, in seconds")


@dataclass(frozen=True)
class WorkerStats:
    """One worker as the pool sees it."""

    name: str
    state: WorkerState
    version: int | None
    inflight: int
    """Calls under way."""
    requests_done: int


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
    inflight: int
    """Requests inside workers."""
    done: int
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
    retries: int
    restarts: int
    failures: dict[str, int] = field(default_factory=dict)
    """Failed requests by class: data, bug, infrastructure (the last are retried)."""

    def metrics(self) -> dict[str, float]:
        """Return the figures as numbers by short name, for a tracker."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


class Meter:
    """Running figures of a pool; every method takes the time, none asks for it."""

    WEIGHT = 0.1  # of the newest value in an exponential average
    BUSY_WINDOW_S = 30.0

    def __init__(self) -> None:
        self.queue_wait_s = self.service_s = 0.0
        self.queue_wait_total_s = self.service_total_s = 0.0
        self.waits = self.calls = self.call_requests = self.done = 0
        self.retries = self.restarts = 0
        self.failures = {"data": 0, "bug": 0, "infrastructure": 0}
        self.busy_ratio = 0.0
        self._busy_now: tuple[float, float] | None = None  # since when, which share

    def waited(self, seconds: float) -> None:
        """A request left the queue after ``seconds``."""
        self.queue_wait_s = self._average(self.queue_wait_s, seconds, self.waits)
        self.queue_wait_total_s += seconds
        self.waits += 1

    def served(self, seconds: float, requests: int) -> None:
        """A call with ``requests`` requests was answered after ``seconds``."""
        self.service_s = self._average(self.service_s, seconds, self.calls)
        self.service_total_s += seconds
        self.calls += 1
        self.call_requests += requests

    def busy(self, busy: int, alive: int, now: float) -> None:
        """From ``now`` on, ``busy`` of ``alive`` workers have a call under way."""
        if self._busy_now is not None:
            since, share = self._busy_now
            fade = math.exp(-max(0.0, now - since) / self.BUSY_WINDOW_S)
            self.busy_ratio = share + (self.busy_ratio - share) * fade
        self._busy_now = (now, busy / alive if alive else 0.0)

    def _average(self, old: float, new: float, seen: int) -> float:
        weight = max(self.WEIGHT, 1.0 / (seen + 1))  # the plain mean of the first few
        return old + (new - old) * weight
