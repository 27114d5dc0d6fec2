"""What a pool has under way for its workers: one asyncio task for each command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class WorkerTasks:
    """Tasks by worker. ``on_end()`` is called as each ends, and before it ``on_bug(worker, error)`` where it raised."""

    def __init__(self, pool: str, on_end: Callable[[], None], on_bug: Callable[[str, BaseException], None]) -> None:
        self._pool, self._on_end, self._on_bug = pool, on_end, on_bug
        self._workers: dict[asyncio.Task[None], str] = {}

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` for worker ``name``."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._pool}:{name}")
        self._workers[task] = name
        task.add_done_callback(self._finished)

    def cancel(self, name: str) -> None:
        """Cancel what is under way for worker ``name``."""
        for task in [task for task, owner in self._workers.items() if owner == name]:
            task.cancel()

    async def end(self) -> None:
        """Cancel all tasks and wait for their ends."""
        for task in self._workers:
            task.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def _finished(self, task: asyncio.Task[None]) -> None:
        name = self._workers.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(name, error)
        self._on_end()
