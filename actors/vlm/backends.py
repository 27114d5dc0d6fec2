"""Two ways to run vLLM behind one small interface: inside this process, or in processes of its own.

Responsible for: starting vLLM, feeding it, and doing things while nothing is running in it. Not responsible for: prompts, sampling
parameters, weights versions (``actors.vlm.engine``). vLLM is imported when a backend starts, not before.

* :class:`InProcessBackend` steps ``LLMEngine`` in one thread. On a CPU this starts three times faster than ``AsyncLLM``, which
  imports vLLM in three processes there, and takes half of the memory.
* :class:`AsyncBackend` is ``AsyncLLM``: preparing requests and running the model overlap, and tensor parallelism works. For GPUs.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Protocol

from actors.failures import InfrastructureError
from actors.vlm.guard import start_guard


class Backend(Protocol):
    """What :class:`actors.vlm.engine.VlmEngine` needs of vLLM."""

    async def start(self) -> None:
        """Load the model."""

    async def generate(self, prompt: dict[str, Any], params: Any, lora: Any) -> Any:
        """Return the finished ``RequestOutput``; ``ValueError`` or ``VLLMClientError`` if vLLM refuses it."""

    async def rpc(self, method: str, *args: Any) -> Any:
        """Call ``method`` of the (first) worker."""

    async def drop_caches(self) -> None:
        """Forget every cache that was computed with the old weights: prefixes, processed inputs, vision features."""

    async def remove_lora(self, lora_id: int) -> None:
        """Forget an adapter."""

    async def sleep(self) -> None:
        """Give up the GPU's memory (vLLM's level 1); nothing may be running. A no-op of vLLM's on a CPU."""

    async def wake_up(self) -> None:
        """Take it back."""

    def check(self) -> None:
        """Raise InfrastructureError if the engine is dead."""

    def close(self) -> None:
        """End the engine and its processes."""


class InProcessBackend:
    """``LLMEngine`` in a thread of this process; every call into the engine happens in that thread."""

    def __init__(self, engine_args: dict[str, Any]):
        self._args = engine_args
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self._dead: BaseException | None = None
        self._closing = False
        self._engine: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="vllm", daemon=True)
        self._thread.start()
        await started

    async def generate(self, prompt: dict[str, Any], params: Any, lora: Any) -> Any:
        request_id = str(next(self._ids))
        done = self._future()
        self._waiting[request_id] = done

        def add() -> None:
            try:
                self._engine.add_request(request_id, prompt, params, lora_request=lora)
            except Exception as error:  # noqa: BLE001 - handed to the waiting caller
                self._resolve(request_id, error)

        self._inbox.put(add)
        return await done

    async def rpc(self, method: str, *args: Any) -> Any:
        return await self._call(lambda: self._engine.collective_rpc(method, args=args)[0])

    async def drop_caches(self) -> None:
        def drop() -> None:
            self._engine.reset_prefix_cache()
            self._engine.reset_mm_cache()
            self._engine.reset_encoder_cache()

        await self._call(drop)

    async def remove_lora(self, lora_id: int) -> None:
        await self._call(lambda: self._engine.remove_lora(lora_id))

    async def sleep(self) -> None:
        await self._call(lambda: self._engine.sleep(level=1))

    async def wake_up(self) -> None:
        await self._call(lambda: self._engine.wake_up())

    def check(self) -> None:
        if self._dead is not None:
            raise InfrastructureError(f"the vLLM engine died: {self._dead!r}") from self._dead

    def close(self) -> None:
        self._closing = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(timeout=10)

    # --- the engine's thread ---

    def _run(self, started: asyncio.Future[None]) -> None:
        try:
            self._engine = _build_llm_engine(self._args)
        except BaseException as error:  # noqa: BLE001 - handed to start()
            self._post(started, error)
            return
        self._post(started, None)
        try:
            while not self._closing:
                self._take()
                if self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        if output.finished:
                            self._resolve(output.request_id, output)
        except BaseException as error:  # noqa: BLE001 - everyone who waits learns of it
            self._dead = error
        finally:
            self._fail_all()
            self._engine.engine_core.shutdown()

    def _take(self) -> None:
        """Run what has come in; wait for it when there is nothing else to do."""
        while True:
            try:
                job = self._inbox.get(block=not self._engine.has_unfinished_requests())
            except queue.Empty:
                return
            if job is None:
                return
            job()

    def _fail_all(self) -> None:
        cause = self._dead or RuntimeError("the engine was closed")
        for request_id in list(self._waiting):
            self._resolve(request_id, InfrastructureError(f"the vLLM engine died: {cause!r}"))

    def _resolve(self, request_id: str, result: Any) -> None:
        self._post(self._waiting.pop(request_id), result)

    # --- between the threads ---

    def _future(self) -> asyncio.Future[Any]:
        self.check()
        if self._closing or self._loop is None:
            raise InfrastructureError("the vLLM engine is not running")
        return self._loop.create_future()

    async def _call(self, function: Callable[[], Any]) -> Any:
        key = f"call-{next(self._ids)}"
        done = self._future()
        self._waiting[key] = done

        def job() -> None:
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - handed to the waiting caller
                self._resolve(key, error)
            else:
                self._resolve(key, result)

        self._inbox.put(job)
        return await done

    def _post(self, future: asyncio.Future[Any], result: Any) -> None:
        def deliver() -> None:
            if future.done():
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)


class AsyncBackend:
    """``AsyncLLM``: the engine in processes of its own."""

    def __init__(self, engine_args: dict[str, Any]):
        self._args = engine_args
        self._ids = itertools.count()
        self._engine: Any = None
        self._guard: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._guard = start_guard()
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._args))

    async def generate(self, prompt: dict[str, Any], params: Any, lora: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self.check()
        final = None
        try:
            async for output in self._engine.generate(prompt, params, str(next(self._ids)), lora_request=lora):
                final = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise InfrastructureError(f"the vLLM engine failed: {error!r} (cause: {error.__cause__!r})") from error
        return final

    async def rpc(self, method: str, *args: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.check()
        try:
            return (await self._engine.collective_rpc(method, args=args))[0]
        except EngineDeadError as error:
            raise InfrastructureError(f"the vLLM engine died during {method}") from error

    async def drop_caches(self) -> None:
        await self._engine.reset_prefix_cache()
        await self._engine.reset_mm_cache()
        await self._engine.reset_encoder_cache()

    async def remove_lora(self, lora_id: int) -> None:
        await self._engine.remove_lora(lora_id)

    async def sleep(self) -> None:
        await self._engine.sleep(level=1)

    async def wake_up(self) -> None:
        await self._engine.wake_up()

    def check(self) -> None:
        if self._engine is None or self._engine.errored:
            raise InfrastructureError("the vLLM engine is dead")

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()


def _build_llm_engine(engine_args: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # vLLM runs full collections while it loads; what importing it has made will not be garbage, and walking it takes seconds.
    gc.collect()
    gc.freeze()
    return LLMEngine.from_engine_args(
        EngineArgs(**engine_args, distributed_executor_backend="uni"), enable_multiprocessing=False
    )
