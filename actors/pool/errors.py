"""How a pool's failures reach the submitter."""

from __future__ import annotations

from cluster.errors import VansError


class SampleFailed(VansError):
    """This request can never succeed: its sample goes to quarantine, the run goes on."""


class WorkerBug(RuntimeError):
    """Code of ours raised inside a worker; the run stops. ``worker_traceback`` is the traceback there, as text."""

    def __init__(self, message: str, worker_traceback: str = "") -> None:
        super().__init__(f"{message}\n\nIn the worker:\n{worker_traceback}" if worker_traceback else message)
        self.worker_traceback = worker_traceback


class PoolFailed(VansError):
    """Machines failed more often than the limits allow: the message names the limit and the last reasons."""
