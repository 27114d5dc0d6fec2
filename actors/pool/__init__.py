"""One elastic pool for all kinds of workers: queue, batches, deadlines, retries, replacement, resizing, weights versions."""

from actors.pool.errors import PoolFailed, SampleFailed, WorkerBug
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo, worker_info
from actors.pool.spec import PoolSpec, PoolStats, Timings, WorkerStats

__all__ = [
    "PoolFailed",
    "PoolSpec",
    "PoolStats",
    "SampleFailed",
    "Timings",
    "WorkerBug",
    "WorkerInfo",
    "WorkerPool",
    "WorkerStats",
    "worker_info",
]
