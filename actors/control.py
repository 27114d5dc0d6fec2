"""The board of a run: one small named Ray actor through which other processes see its pools and ask for other sizes.

It holds the run's latest snapshot and a mailbox; it knows neither pools nor configuration, and what passes through it is JSON
text, so that its process imports next to nothing. The run and everyone who asks are its clients, and it outlives no run: it is
not detached, so it ends with the driver that made it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from typing import Any

NAMESPACE = "vans"
_PREFIX = "control/"


def board_name(run: str, token: str) -> str:
    """Return the actor's name of ``run``; ``token`` tells apart runs of one name."""
    return f"{_PREFIX}{run}/{token}"


class Board:
    """The actor. Times are seconds of its own monotonic clock."""

    def __init__(self) -> None:
        self._snapshot = ""
        self._seen = time.monotonic()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, str] = {}
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._arrival = asyncio.Event()

    async def exchange(self, snapshot: str, answers: Mapping[int, str], wait_s: float) -> dict[int, str]:
        """For the run: leave ``snapshot`` and the ``answers`` to earlier requests, take new requests.

        Returns as soon as there is a request, after ``wait_s`` without one.
        """
        self._snapshot, self._seen = snapshot, time.monotonic()
        for number, answer in answers.items():
            future = self._answers.get(number)
            if future is not None and not future.done():
                future.set_result(answer)
        try:
            await asyncio.wait_for(self._arrival.wait(), wait_s)
        except TimeoutError:
            pass
        self._arrival.clear()
        taken, self._waiting = self._waiting, {}
        return taken

    async def read(self) -> tuple[str, float]:
        """Return the latest snapshot ("" before the first) and how long ago the run left it, in seconds."""
        return self._snapshot, time.monotonic() - self._seen

    async def ask(self, request: str, timeout_s: float) -> str | None:
        """Put ``request`` into the mailbox and return the run's answer.

        None after ``timeout_s`` without one; a request that the run has not taken by then is withdrawn.
        """
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._waiting[number] = request
        self._arrival.set()
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(number, None)
            del self._answers[number]


def open_board(name: str) -> Any:
    """Create the board ``name`` on this node and return its handle at once. It takes no CPU slot."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(Board).options(
        name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=0, max_concurrency=64, scheduling_strategy=here
    )
    return actor.remote()


def find_board(name: str) -> Any | None:
    """Return the handle of the board ``name``, or None where the cluster has none."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def boards() -> dict[str, list[str]]:
    """Return the names of the cluster's boards by run."""
    import ray

    found: dict[str, list[str]] = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        name = entry["name"]
        if entry["namespace"] == NAMESPACE and name.startswith(_PREFIX):
            found.setdefault(name.removeprefix(_PREFIX).rpartition("/")[0], []).append(name)
    return found
