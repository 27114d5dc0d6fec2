"""``python kill_at.py POINT N train …``: the command line, whose process is killed with SIGKILL the Nth time it comes to POINT.

The points are places inside the driver at which a death is most likely to be resumed wrongly. They are reached by wrapping the
methods that pass them, so that the code under test holds no switch for being killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.learner.group import LearnerGroup
from actors.pool.pool import WorkerPool
from pipeline.checkpoint import TrainState, store
from pipeline.stages import loop
from pipeline.stages.stage2 import Stage2
from pipeline.tracking import Tracker


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Calls ``die`` the ``times``th time it is asked to."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def mid_rollout(due: Countdown) -> None:
    """Some groups of the step have been answered, others have not."""
    rollout, gather = loop.rollout, loop.gather
    doomed = False

    async def counted(*args: Any) -> Any:
        nonlocal doomed
        doomed = due()
        return await rollout(*args)

    async def dying(tasks: list[asyncio.Task[Any]]) -> list[Any]:
        if doomed:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            die()
        return await gather(tasks)

    loop.rollout, loop.gather = counted, dying


def mid_update(due: Countdown) -> None:
    """The ranks are at work on an optimizer step."""
    update = LearnerGroup.update

    async def dying(self: LearnerGroup, *args: Any, **options: Any) -> dict[str, float]:
        if due():
            task = asyncio.ensure_future(update(self, *args, **options))
            await asyncio.wait({task}, timeout=0.1)
            die()
        return await update(self, *args, **options)

    LearnerGroup.update = dying  # type: ignore[method-assign]


def before_weights_are_served(due: Countdown) -> None:
    """The learner has new weights, the pool has the old ones."""
    _around(WorkerPool, "set_weights", due, after=False)


def while_weights_load(due: Countdown) -> None:
    """The workers are loading new weights."""
    set_weights = WorkerPool.set_weights

    async def dying(self: WorkerPool, *args: Any) -> None:
        if due():
            task = asyncio.ensure_future(set_weights(self, *args))
            await asyncio.wait({task}, timeout=0.01)
            die()
        await set_weights(self, *args)

    WorkerPool.set_weights = dying  # type: ignore[method-assign]


def metrics_logged(due: Countdown) -> None:
    """A step's metrics are on their way to MLflow, and no checkpoint holds the step."""
    log_metrics = Tracker.log_metrics

    def dying(self: Tracker, *args: Any, **options: Any) -> Any:
        result = log_metrics(self, *args, **options)
        if due():
            self.flush()
            die()
        return result

    Tracker.log_metrics = dying  # type: ignore[method-assign]


def mid_checkpoint(due: Countdown) -> None:
    """The learner's state is written, the run's is not."""
    save = TrainState.save

    def dying(self: TrainState, folder: Path) -> Path:
        if due():
            die()
        return save(self, folder)

    TrainState.save = dying  # type: ignore[method-assign]


def before_the_rename(due: Countdown) -> None:
    """The checkpoint is whole and flushed, but not in its place."""
    flush = store._flush

    def dying(path: Path) -> None:
        flush(path)
        if path.name.startswith(store.WRITING) and due():
            die()

    store._flush = dying


def checkpoint_written(due: Countdown) -> None:
    """The checkpoint is in its place; nothing came after it."""
    prune = store.CheckpointStore.prune

    def dying(self: store.CheckpointStore) -> list[Path]:
        if due():
            die()
        return prune(self)

    store.CheckpointStore.prune = dying  # type: ignore[method-assign]


def mid_export(due: Countdown) -> None:
    """A stage is trained, and its result is being written for the next one."""
    export = LearnerGroup.export

    async def dying(self: LearnerGroup, folder: str) -> None:
        if "checkpoints" not in Path(folder).parts and due():
            task = asyncio.ensure_future(export(self, folder))
            await asyncio.wait({task}, timeout=0.02)
            die()
        await export(self, folder)

    LearnerGroup.export = dying  # type: ignore[method-assign]


def stage_change(due: Countdown) -> None:
    """Stage 1 has ended, stage 2 has not begun."""
    begin = Stage2.__init__

    def dying(self: Stage2, *args: Any, **options: Any) -> None:
        if due():
            die()
        begin(self, *args, **options)

    Stage2.__init__ = dying  # type: ignore[method-assign]


def _around(owner: type, name: str, due: Countdown, *, after: bool) -> None:
    method = getattr(owner, name)

    async def dying(self: Any, *args: Any, **options: Any) -> Any:
        if not after and due():
            die()
        result = await method(self, *args, **options)
        if after and due():
            die()
        return result

    setattr(owner, name, dying)


POINTS: dict[str, Callable[[Countdown], None]] = {
    function.__name__: function
    for function in (
        mid_rollout,
        mid_update,
        before_weights_are_served,
        while_weights_load,
        metrics_logged,
        mid_checkpoint,
        before_the_rename,
        checkpoint_written,
        mid_export,
        stage_change,
    )
}


if __name__ == "__main__":
    point, times, *arguments = sys.argv[1:]
    POINTS[point](Countdown(int(times)))
    sys.argv = ["vans", *arguments]
    from pipeline.cli import app

    app()
