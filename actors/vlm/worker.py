"""The VLM pool's Ray actor: a :class:`VlmEngine` behind the worker protocol of ``actors.pool.protocol``.

The class is undecorated; make an actor with ``ray.remote(VlmWorker).options(max_concurrency=1000, …)``. Its methods are async and
vLLM batches whatever calls run at once, so the pool keeps many small calls in flight (``max_batch: 1``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.failures import Ok, Outcome, failure_of
from actors.pool.protocol import WorkerInfo, worker_info
from actors.records import CompletionRequest, Weights
from actors.vlm.engine import EngineSpec, VlmEngine


class VlmWorker:
    """Samples completions. ``options`` are the fields of :class:`EngineSpec` beside the model path."""

    def __init__(self, name: str, model_path: str, *, threads: int | None = 1, **options: Any) -> None:
        self.name = name
        self._threads = threads
        self._arrival: str = "model folder"
        self._engine = VlmEngine(EngineSpec(model_path, **options))

    async def setup(self) -> WorkerInfo:
        """Start vLLM and load the model."""
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
        await self._engine.start()
        return worker_info(self.name, _device(), await self._engine.base_hash())

    async def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Serve the published weights from now on; None brings back the base weights."""
        self._arrival = "model folder"
        if payload is None:
            return await self._engine.load(None, version)
        from actors.weights.transport import offer_of, receive

        async def fetch() -> Weights:
            # Off the event loop: a blocking fetch would hold up every running completion. (to_thread would carry the
            # loop's context along, and Ray would warn of blocking it.)
            return await asyncio.get_running_loop().run_in_executor(None, receive, payload)

        offer = offer_of(payload)
        if offer is not None:
            self._arrival = await self._engine.load_offered(offer, fetch, version)
            return version
        self._arrival = "object store"
        return await self._engine.load(await fetch(), version)

    async def arrival(self) -> str:
        """Return how the weights that it serves have come: ``object store``, ``broadcast`` or ``model folder``."""
        return self._arrival

    async def rest(self) -> None:
        """Give up the GPU's memory until the engine is next needed."""
        await self._engine.rest()

    async def process(self, requests: Sequence[CompletionRequest]) -> list[Outcome]:
        """Complete all requests together; a failure is pinned to its own request."""
        return list(await asyncio.gather(*(self._one(request) for request in requests)))

    async def _one(self, request: CompletionRequest) -> Outcome:
        try:
            return Ok(await self._engine.generate(request))
        except Exception as error:  # noqa: BLE001 - classed and returned to the pool
            return failure_of(error)

    async def weights_hash(self) -> str:
        """Return the hash of the base weights and the version served."""
        return await self._engine.weights_hash()

    async def counters(self) -> dict[str, float]:
        """See :meth:`VlmEngine.counters`."""
        return await self._engine.counters()

    async def config(self) -> dict[str, Any]:
        """Return the model's configuration, with the values that its file leaves to transformers."""
        return self._engine.config

    async def ping(self) -> str:
        """Return the worker's name; raises InfrastructureError if the engine is dead."""
        self._engine.check()
        return self.name

    async def shutdown(self) -> None:
        """End the engine."""
        await asyncio.to_thread(self._engine.close)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
