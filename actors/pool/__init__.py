"""One elastic pool for all kinds of workers.

For: queue, batches, deadlines, retries, replacement, resizing, versions of weights.
Not for: what a worker does (``vlm``, ``vdm``, ``scoring``), where it stands (``cluster.resources``).
Begin with ``pool``.
"""

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
