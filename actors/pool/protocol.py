"""What a pool asks of its workers: the five methods that every Ray actor in a pool has.

The pool's state machine, dispatch and driver are elsewhere in this package; this module holds no behaviour.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.failures import Outcome


@dataclass(frozen=True)
class WorkerInfo:
    """Who a worker is, once its model is loaded."""

    name: str
    node: str
    """IP address of the node."""
    pid: int
    device: str
    model_hash: str = ""
    """Hash of the base (frozen) parameters; equal for all workers of a pool."""


def worker_info(name: str, device: str, model_hash: str = "") -> WorkerInfo:
    """Return the :class:`WorkerInfo` of the Ray actor that calls this."""
    import ray

    return WorkerInfo(name, ray.util.get_node_ip_address(), os.getpid(), device, model_hash)


class Worker(Protocol):
    """Methods of a pool's Ray actor; an async actor defines them ``async``.

    The actor is created with ``max_restarts=0``: Ray would bring it back with its first weights and let it serve. The
    pool replaces a dead actor by a new one, which loads the current weights before it serves. A method ``shutdown()``,
    where there is one, is called before a healthy worker is ended; a method ``rest()`` gives up the device's memory
    until something needs it (``WorkerPool.rest``).
    """

    def setup(self) -> WorkerInfo:
        """Load the model. ``InfrastructureError``: another attempt may succeed; any other error stops the pool."""
        ...

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Load weights ``version`` and return it.

        ``payload`` is what ``actors.weights.fetch`` takes; None means the base weights.
        """
        ...

    def process(self, requests: Sequence[Any]) -> list[Outcome]:
        """Answer each request with ``Ok`` or ``Failure``, in order; raise only if nothing can be answered.

        A request may be sent more than once (its first worker died), so its answer depends on the request and the
        weights alone.
        """
        ...

    def weights_hash(self) -> str:
        """Return a hash of the frozen parameters and the version served."""
        ...

    def ping(self) -> Any:
        """Return anything: a worker that answers is alive. Raise if the engine behind it is not."""
        ...
