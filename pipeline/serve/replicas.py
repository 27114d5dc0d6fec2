"""The replicas of the two models: the pools' workers, behind Ray Serve instead of a pool.

A replica answers each request with ``Ok`` or ``Failure``, as a pool's worker does, and may be asked the same again. Requests are
not batched with others here but by vLLM, so a clip does not depend on who else asks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.failures import Failure, Outcome
from actors.records import CompletionRequest, RenderRequest
from pipeline.config import RunConfig
from pipeline.fleet.kinds import KINDS
from pipeline.serve.exports import Export, Policy, newest_export

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Following:
    """Where a replica looks for newer weights, every ``every_s`` seconds, and which it has from its start."""

    config: RunConfig
    run: Path
    policy: Policy
    every_s: float
    first: Export | None


class Replica(ABC):
    """What both have in common: they load a model once, and newer weights as a run exports them."""

    def __init__(self, arguments: Mapping[str, Any], following: Following | None = None) -> None:
        self._arguments = dict(arguments)
        self._following = following
        self._now = following.first if following else None
        self._version = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model, and the newest weights where they are followed."""
        await self.setup()
        if self._following is not None:
            await self._look(self._following)
            self._task = asyncio.create_task(self._follow(self._following))

    @abstractmethod
    async def setup(self) -> None:
        """Load the model."""

    @abstractmethod
    async def load(self, version: int, payload: list[Any]) -> None:
        """Serve other weights from the next request on."""

    async def _follow(self, following: Following) -> None:
        while True:
            await asyncio.sleep(following.every_s)
            await self._look(following)

    async def _look(self, following: Following) -> None:
        """Load the newest export, where it is another than the one that is served. One that cannot be read is tried again."""
        try:
            newest = await asyncio.to_thread(newest_export, following.config, following.run, following.policy)
            if newest is None or newest == self._now:
                return
            from actors.weights.files import read_weights
            from actors.weights.transport import send

            version = self._version + 1
            weights = await asyncio.to_thread(read_weights, newest.folder, version)
            await self.load(version, send(weights))
            self._now, self._version = newest, version
            log.info("%s serves %s", following.policy, newest.folder)
        except Exception as error:  # noqa: BLE001 - the weights that are served stay, and the next look tries again
            log.warning("%s keeps its weights: %s", following.policy, error)


class Thinker(Replica):
    """One vLLM engine."""

    async def __init__(self, arguments: Mapping[str, Any], following: Following | None = None) -> None:  # type: ignore[misc]
        super().__init__(arguments, following)
        self._worker = KINDS["vlm"].load()("thinker", **self._arguments)
        await self.start()

    async def setup(self) -> None:
        await self._worker.setup()

    async def load(self, version: int, payload: list[Any]) -> None:
        await self._worker.load_weights(version, payload)

    async def complete(self, request: CompletionRequest) -> Outcome:
        """Return the completions of ``request``."""
        (outcome,) = await self._worker.process([request])
        return _told(outcome)

    async def check_health(self) -> None:
        """Raise where the engine is dead; Ray Serve then replaces the replica."""
        await self._worker.ping()


class Artist(Replica):
    """One sampler. Its calls block, so they have a thread of their own."""

    async def __init__(self, arguments: Mapping[str, Any], following: Following | None = None) -> None:  # type: ignore[misc]
        super().__init__(arguments, following)
        self._thread = ThreadPoolExecutor(1, "artist")
        self._worker = KINDS["vdm"].load()("artist", **self._arguments)
        await self.start()

    async def setup(self) -> None:
        await self._call(self._worker.setup)

    async def load(self, version: int, payload: list[Any]) -> None:
        await self._call(self._worker.load_weights, version, payload)

    async def draw(self, request: RenderRequest) -> AsyncIterator[float | Outcome]:
        """Yield after each denoising step the share of them that is done, and at last the clip of ``request``.

        A request has a call of the sampler to itself. Where this is closed or cancelled before its end, as it is when the
        request is taken back, the sampler stops after the step that it is at, and no other request is touched.
        """
        from actors.vdm.sampling import NotWanted

        loop, steps = asyncio.get_running_loop(), asyncio.Queue[float | None]()
        unwanted = threading.Event()

        def on_step(done: int, of: int) -> None:
            if unwanted.is_set():
                raise NotWanted
            loop.call_soon_threadsafe(steps.put_nowait, done / of)

        drawing = asyncio.ensure_future(self._call(self._worker.process, [request], on_step))
        drawing.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (share := await steps.get()) is not None:
                yield share
            (outcome,) = await drawing
            yield _told(outcome)
        finally:
            unwanted.set()
            drawing.cancel()  # where it waits for the thread

    def check_health(self) -> None:
        """Raise where the model is not there."""
        self._worker.ping()

    async def _call(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _told(outcome: Outcome) -> Outcome:
    """Log a bug with its traceback: the person who asked is told the message alone."""
    if isinstance(outcome, Failure) and outcome.kind == "bug":
        log.error("%s", outcome.traceback)
    return outcome
