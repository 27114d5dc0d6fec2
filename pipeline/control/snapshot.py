"""What other processes see of a run: its pools at one moment, as JSON text. Pure values; ``vans status --json`` prints them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from actors.pool.spec import PoolStats


@dataclass(frozen=True)
class WorkerView:
    """One worker."""

    name: str
    state: str
    """As in ``actors.pool.state``, or ``no room``: the cluster has no room for its process yet."""
    node: str
    version: int | None
    """Weights that it holds."""
    inflight: int
    """Calls under way."""
    requests_done: int


@dataclass(frozen=True)
class PoolView:
    """One pool. ``figures`` are those of ``PoolStats.metrics`` (docs/metrics.md, pool/<pool>/…)."""

    name: str
    figures: dict[str, float]
    workers: tuple[WorkerView, ...]
    autoscale: str
    """``off``, or its limits."""
    failures: dict[str, int]

    @property
    def target(self) -> int:
        """Workers that the pool should have."""
        return int(self.figures["target"])

    @property
    def no_room(self) -> int:
        """Workers that wait for room in the cluster."""
        return sum(worker.state == NO_ROOM for worker in self.workers)

    @property
    def coming(self) -> int:
        """Workers on their way, those without room included."""
        return sum(worker.state in ("starting", "restarting", NO_ROOM) for worker in self.workers)

    def states(self) -> dict[str, int]:
        """Return how many workers are in each state."""
        return dict(Counter(worker.state for worker in self.workers))


@dataclass(frozen=True)
class Resize:
    """A change of a pool's size."""

    at: float
    """Seconds since the epoch."""
    pool: str
    before: int
    after: int
    by: str
    """``vans scale``, ``autoscaler``, or why a place was lent (``room``)."""


@dataclass(frozen=True)
class RunView:
    """A run's pools. ``at`` is seconds since the epoch on the run's machine."""

    run: str
    at: float
    pools: tuple[PoolView, ...]
    free: str
    """What the cluster has free, where a worker waits for room; else empty."""
    resizes: tuple[Resize, ...] = ()
    """The last few."""
    every_s: float = 1.0
    """Time between two views."""

    def pool(self, name: str) -> PoolView:
        """Return the pool of that name."""
        return next(pool for pool in self.pools if pool.name == name)

    def to_json(self) -> str:
        """Return the view as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunView:
        """Read what :meth:`to_json` wrote."""
        found: dict[str, Any] = json.loads(text)
        pools = (
            PoolView(**pool | {"workers": tuple(WorkerView(**w) for w in pool["workers"])}) for pool in found["pools"]
        )
        return cls(**found | {"pools": tuple(pools), "resizes": tuple(Resize(**r) for r in found["resizes"])})


NO_ROOM = "no room"


def pool_view(stats: PoolStats, autoscale: str = "off", without_room: Collection[str] = ()) -> PoolView:
    """Return ``stats`` for others to see; ``without_room`` names the workers that the cluster has no room for."""
    workers = tuple(
        WorkerView(
            name=w.name,
            state=NO_ROOM if w.name in without_room else w.state.value,
            node=w.node,
            version=w.version,
            inflight=w.inflight,
            requests_done=w.requests_done,
        )
        for w in stats.workers
    )
    return PoolView(stats.name, stats.metrics(), workers, autoscale, dict(stats.failures))
