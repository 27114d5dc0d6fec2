"""The pools' figures as Ray metrics, for Ray's dashboard, Prometheus and Grafana. Set by the driver, with a tag for run and pool.

Ray puts ``ray_`` before each name. The same figures go to MLflow once a step (``pipeline.stages.loop``).
"""

from __future__ import annotations

from actors.pool.spec import PoolStats, Timings
from actors.pool.state import WorkerState

PREFIX = "vans_pool"
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
"""Boundaries of the histograms."""

GAUGES = {
    "target": "Workers that the pool should have.",
    "queue_len": "Requests waiting for a worker.",
    "oldest_wait_s": "How long the oldest waiting request has waited, in seconds.",
    "inflight": "Requests inside workers.",
    "busy_ratio": "Share of live workers with a call under way, over about 30 s.",
    "requests_per_min": "Requests answered per minute, over the last minute.",
    "version": "Weights version that the pool serves.",
}
COUNTERS = {
    "done": "Requests answered.",
    "retries": "Requests sent again after an infrastructure failure.",
    "restarts": "Workers replaced.",
}
HISTOGRAMS = {"queue_wait_s": "From submission to dispatch.", "service_s": "From dispatch to answer of one call."}


class Exporter:
    """Ray metrics of one run's pools; Ray has to be connected."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._run = run
        tags = ("run", "pool")
        self._workers = Gauge(f"{PREFIX}_workers", description="Workers by state.", tag_keys=(*tags, "state"))
        self._gauges = {
            name: Gauge(f"{PREFIX}_{name}", description=text, tag_keys=tags) for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(f"{PREFIX}_{name}", description=text, tag_keys=tags) for name, text in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"{PREFIX}_{name}", description=text, boundaries=SECONDS, tag_keys=tags)
            for name, text in HISTOGRAMS.items()
        }
        self._counted: dict[tuple[str, str], float] = {}

    def export(self, stats: PoolStats, timings: Timings) -> None:
        """Set the figures of one pool; ``timings`` are those since its last export."""
        tags, figures = {"run": self._run, "pool": stats.name}, stats.metrics()
        for state in WorkerState:  # all of them, so that a state that nobody is in any more goes back to 0
            count = sum(worker.state is state for worker in stats.workers)
            self._workers.set(count, tags | {"state": state.value})
        for name, gauge in self._gauges.items():
            gauge.set(figures[name], tags)
        for name, counter in self._counters.items():
            grown = figures[name] - self._counted.get((stats.name, name), 0.0)
            if grown > 0:
                counter.inc(grown, tags)
            self._counted[stats.name, name] = figures[name]
        for name, values in (("queue_wait_s", timings.waits), ("service_s", timings.calls)):
            for value in values:
                self._histograms[name].observe(value, tags)
