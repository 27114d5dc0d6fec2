"""The VLM's sampler: vLLM, with our prompt, our banned tokens, and a weights version on every completion.

Responsible for: turning a :class:`CompletionRequest` into completions, and for switching weights without mixing versions. Not
responsible for: how vLLM is run (``actors.vlm.backends``), Ray (``actors.vlm.worker``), log-probabilities for training
(``actors.vlm.policy``, which agrees with this one).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from actors.failures import BadSampleError, InfrastructureError
from actors.records import Completion, CompletionRequest, Weights
from actors.vlm.backends import AsyncBackend, Backend, InProcessBackend
from actors.vlm.inputs import check_frames, video_metadata, writable
from actors.vlm.prompt import BAN_BIAS, PROCESSOR_OPTIONS, banned_token_ids, load_processor, render_prompt

if TYPE_CHECKING:
    from actors.weights import Offer

log = logging.getLogger(__name__)

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be told


@dataclass(frozen=True)
class EngineSpec:
    """How to run vLLM. ``lora_rank``: the largest adapter rank that will be published; 0 switches LoRA off."""

    model_path: str
    dtype: str = "float32"
    max_model_len: int = 512
    kv_cache_mib: int | None = 256
    gpu_memory_utilization: float = 0.85
    tensor_parallel: int = 1
    enforce_eager: bool = True
    lora_rank: int = 0
    adapter: str | None = None  # PEFT folder that is part of the base weights (version 0)
    in_process: bool | None = None  # None: in this process without a GPU, in vLLM's own processes with one
    max_num_seqs: int = 256
    broadcast: bool = False  # full weights may come by broadcast, through vLLM's native weight transfer
    sleep: bool = False  # :meth:`VlmEngine.rest` gives up the GPU's memory (on a CPU there is nothing to give)
    grouped_lora: bool = True  # adapters on a CPU by whole matrix products: see ``actors.vlm.lora_cpu``
    text_at_end: bool = True  # a completion's text is made once it has ended, not token by token
    alone: bool = False  # one sequence at a time, nothing reused: no figure depends on what shares a batch
    env: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Adapter:
    """One LoRA version that vLLM may still be serving."""

    request: Any  # vllm LoRARequest
    folder: Path
    users: int = 0
    retired: bool = False


class VlmEngine:
    """Samples completions; one event loop, any number of concurrent :meth:`generate` calls (vLLM batches them)."""

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self.version = 0
        self._backend: Backend | None = None
        self._adapter: _Adapter | None = None
        self._lora_ids = 0
        self._running = 0
        self._asked = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()
        self._open.set()
        self._load = asyncio.Lock()
        self._full = False  # the live model's weights are no longer the folder's
        self._resting = False
        self._folder: Path | None = None

    async def start(self) -> None:
        """Load the model. Raises InfrastructureError where another attempt may succeed; see the message otherwise."""
        self.spec = _with_adapter_rank(self.spec)
        prepare_environment(self.spec)
        from transformers import AutoConfig

        self.processor = load_processor(self.spec.model_path)
        config: Any = AutoConfig.from_pretrained(self.spec.model_path)
        banned = banned_token_ids(self.processor.tokenizer, int(config.text_config.vocab_size))
        self._bias = dict.fromkeys(banned, BAN_BIAS)
        self._folder = _private_folder()
        backend = InProcessBackend if _in_process(self.spec) else AsyncBackend
        self._backend = backend(_engine_args(self.spec))
        await self._backend.start()
        await self._backend.rpc("vans_count_videos")
        if self.spec.grouped_lora and self.spec.lora_rank and not _on_gpu():
            await self._backend.rpc("vans_group_lora")
        await self._serve_base(0)

    @property
    def backend(self) -> Backend:
        """The running backend; InfrastructureError before :meth:`start` and after :meth:`close`."""
        if self._backend is None:
            raise InfrastructureError("the VLM engine is not started")
        return self._backend

    async def generate(self, request: CompletionRequest) -> list[Completion]:
        """Return ``request.n`` completions; completion i is drawn with seed ``request.seed + i``. Temperature 0 is greedy.

        Raises:
            BadSampleError: frames or question cannot be used, or the prompt leaves no room in the context.
            InfrastructureError: the engine died.
        """
        check_frames(request.frames)
        prompt = {
            "prompt": render_prompt(self.processor, request.question),
            "multi_modal_data": {
                "video": (
                    writable(request.frames),
                    {**video_metadata(request.frames, request.fps), "do_sample_frames": False},
                )
            },
        }
        while self._resting or not self._open.is_set():  # it may be closed again before a waiter runs
            await (self.wake() if self._resting else self._open.wait())
        # Nothing is awaited between here and the count: what is served and what is stamped cannot come apart.
        adapter, version = self._adapter, self.version
        self._running += 1
        self._asked += request.n
        self._idle.clear()
        if adapter is not None:
            adapter.users += 1
        try:
            output = await self.backend.generate(prompt, self._sampling(request), adapter and adapter.request)
        except (ValueError, _client_error()) as error:
            raise BadSampleError(f"sample {request.sample_id!r} cannot be completed: {error}") from error
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()
            if adapter is not None:
                adapter.users -= 1
                await self._sweep(adapter)
        completions = [self._completion(o, version) for o in sorted(output.outputs, key=lambda o: o.index)]
        return completions * request.n if request.temperature == 0 else completions

    async def load(self, weights: Weights | None, version: int | None = None) -> int:
        """Serve ``weights`` (None: those of the model folder) from now on, and return their version.

        Requests that are running keep an adapter they began with; full weights wait for them.
        """
        new = version if version is not None else (0 if weights is None else weights.version)
        async with self._load:
            await self._wake()
            if weights is None:
                await self._serve_base(new)
            elif weights.kind == "lora":
                await self._serve_adapter(weights, new)
            else:
                await self._serve_full(weights, new)
        return new

    async def load_offered(
        self, offer: Offer, otherwise: Callable[[], Awaitable[Weights]], version: int
    ) -> Literal["broadcast", "object store"]:
        """Serve the full weights of ``offer`` from now on; where they do not come, those that ``otherwise`` fetches.

        Returns which of the two it was. Requests that are running are waited for; later ones wait for the new weights.
        """
        arrival: Literal["broadcast", "object store"] = "broadcast"

        async def receive() -> None:
            nonlocal arrival
            try:
                await self.backend.rpc("vans_receive", asdict(offer))
                return
            except InfrastructureError:
                raise
            except Exception as error:  # noqa: BLE001 - vLLM's processes pass on the text of an error, not its class
                log.warning("weights version %d are taken from the object store: %s", version, error)
            arrival = "object store"
            from actors.weights import as_tensors

            with self._written(as_tensors(await otherwise())) as path:
                await self.backend.rpc("vans_reload", path)

        async with self._load:
            await self._wake()
            await self._replace(receive, None, version)
            self._full = True
        return arrival

    # --- giving up memory

    async def rest(self) -> None:
        """Give up the GPU's memory until the engine is next needed: vLLM keeps the weights in host memory and drops its caches.

        It wakes by itself for a request, for weights and for a hash. On a CPU vLLM keeps everything where it is.
        """
        async with self._load:
            if self._resting:
                return
            self._open.clear()
            try:
                await self._idle.wait()
                await self.backend.drop_caches()
                await self.backend.sleep()
                self._resting = True
            finally:
                self._open.set()

    async def wake(self) -> None:
        """Take the memory back, where it was given up."""
        async with self._load:
            await self._wake()

    async def _wake(self) -> None:
        if self._resting:
            await self.backend.wake_up()
            self._resting = False

    # --- what is served

    async def weights_hash(self) -> str:
        """Return the hash of the base weights in the engine's memory, and the version served."""
        return f"{await self.base_hash()}:{self.version}"

    async def base_hash(self) -> str:
        """Return the hash of the base (frozen) weights in the engine's memory."""
        async with self._load:
            await self._wake()
            return str(await self.backend.rpc("vans_base_hash"))

    async def counters(self) -> dict[str, float]:
        """Return the videos that the vision tower encoded, and the completions that needed one, since the start."""
        encoded = await self.backend.rpc("vans_videos_encoded")
        return {"videos": float(encoded), "videos_asked": float(self._asked)}

    def check(self) -> None:
        """Raise InfrastructureError if the engine is dead."""
        self.backend.check()

    def close(self) -> None:
        """End the engine; its folder of adapters is removed."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # --- weights ---

    async def _serve_base(self, version: int) -> None:
        if self.spec.adapter is not None:
            from actors.weights import read_adapter

            await self._serve_adapter(read_adapter(self.spec.adapter, 0), version)
        else:
            await self._on_base(None, version)

    async def _on_base(self, adapter: _Adapter | None, version: int) -> None:
        """Serve ``adapter`` (None: none) on the model folder's own weights, whatever was served before."""
        if not self._full:
            await self._switch(adapter, version)
            return
        from actors.vlm.policy import load_model

        model, _ = load_model(self.spec.model_path, "float32")
        await self._reload(model.state_dict(), adapter, version)
        self._full = False

    async def _serve_adapter(self, weights: Weights, version: int) -> None:
        from vllm.lora.request import LoRARequest

        from actors.weights import write_adapter

        rank = int(weights.adapter_config.get("r", 0))
        if rank > self.spec.lora_rank:
            raise ValueError(
                f"an adapter of rank {rank} was published to an engine started with lora_rank={self.spec.lora_rank}; "
                "start the VLM pool with the rank of the run (stage1.lora.rank)"
            )
        assert self._folder is not None
        # An id of its own for every load: vLLM keeps adapters and prefix caches by id and name.
        self._lora_ids += 1
        name = f"v{version}-{self._lora_ids}"
        folder = write_adapter(weights, self._folder / name)
        await self._on_base(_Adapter(LoRARequest(name, self._lora_ids, str(folder)), Path(folder)), version)

    async def _serve_full(self, weights: Weights, version: int) -> None:
        from actors.weights import as_tensors

        await self._reload(as_tensors(weights), None, version)
        self._full = True

    async def _switch(self, adapter: _Adapter | None, version: int) -> None:
        old, self._adapter, self.version = self._adapter, adapter, version
        if old is not None:
            old.retired = True
            await self._sweep(old)

    async def _sweep(self, adapter: _Adapter) -> None:
        """Remove a retired adapter once nobody uses it; until then vLLM may read its folder again."""
        if adapter.retired and adapter.users == 0 and adapter.folder.exists():
            shutil.rmtree(adapter.folder, ignore_errors=True)
            await self.backend.remove_lora(adapter.request.lora_int_id)

    async def _reload(self, tensors: Mapping[str, Any], adapter: _Adapter | None, version: int) -> None:
        """Replace the model's own weights by ``tensors``, and serve ``adapter`` (None: none) on them."""
        with self._written(tensors) as path:
            await self._replace(lambda: self.backend.rpc("vans_reload", path), adapter, version)

    async def _replace(self, load: Callable[[], Awaitable[Any]], adapter: _Adapter | None, version: int) -> None:
        """Let ``load`` replace the model's own weights while nothing runs; requests that arrive meanwhile wait for the new ones."""
        self._open.clear()
        try:
            await self._idle.wait()
            await load()
            await self.backend.drop_caches()
            await self._switch(adapter, version)
        finally:
            self._open.set()

    @contextmanager
    def _written(self, tensors: Mapping[str, Any]) -> Iterator[str]:
        """Yield a safetensors file of ``tensors``: the engine may be a process of its own."""
        from safetensors.torch import save_file

        assert self._folder is not None
        path = self._folder / "full.safetensors"
        # Clones: tied weights (embedding and head) share memory, which the file format refuses.
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, str(path))
        try:
            yield str(path)
        finally:
            path.unlink(missing_ok=True)

    # --- requests ---

    def _sampling(self, request: CompletionRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = request.temperature == 0
        return SamplingParams(
            n=1 if greedy else request.n,
            temperature=request.temperature,
            top_p=1.0,
            top_k=0,
            seed=None if greedy else request.seed % (1 << 62),
            max_tokens=request.max_tokens,
            logprobs=0,
            logit_bias=self._bias,
            detokenize=not self.spec.text_at_end,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, version: int) -> Completion:
        ids = np.asarray(output.token_ids, dtype=np.int32)
        logprobs = [entry[int(token)].logprob for entry, token in zip(output.logprobs, ids, strict=True)]
        return Completion(
            text=self._text(output.token_ids) if self.spec.text_at_end else output.text,
            token_ids=ids,
            logprobs=np.asarray(logprobs, dtype=np.float32),
            finish_reason=str(output.finish_reason),
            weights_version=version,
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        # The tokenizer's own decoding, without clean-up of spaces. Of a character that was cut off, nothing is shown.
        decoded: str = self.processor.tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return decoded.rstrip("\N{REPLACEMENT CHARACTER}")


def _client_error() -> type[Exception]:
    """Return vLLM's class of errors that are the request's own fault."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError


def _engine_args(spec: EngineSpec) -> dict[str, Any]:
    args: dict[str, Any] = {
        "model": spec.model_path,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "tensor_parallel_size": spec.tensor_parallel,
        "enforce_eager": spec.enforce_eager,
        "max_num_seqs": 1 if spec.alone else spec.max_num_seqs,
        "limit_mm_per_prompt": {"video": 1, "image": 0},
        "skip_mm_profiling": True,
        "mm_processor_kwargs": dict(PROCESSOR_OPTIONS),
        "mm_processor_cache_gb": 1.0,
        # The log-probabilities of the distribution that was sampled from: after the ban and the temperature.
        "logprobs_mode": "processed_logprobs",
        # The folder's generation_config must not bend top_p or penalties behind our back.
        "generation_config": "vllm",
        "worker_extension_cls": "actors.vlm.extension.WeightsExtension",
        "disable_log_stats": True,
        "seed": 0,
    }
    if spec.alone:
        args["enable_prefix_caching"] = False
    if spec.kv_cache_mib is not None:
        args["kv_cache_memory_bytes"] = spec.kv_cache_mib << 20
    if not _on_gpu():
        # On a CPU, vLLM 0.32 dies of a seeded request whose prompt is prefilled in chunks ("CPU Generator does not use
        # offset"), so prompts are prefilled whole.
        args["enable_chunked_prefill"] = False
        args["max_num_batched_tokens"] = max(4096, spec.max_model_len)
    if spec.sleep and _on_gpu():
        args["enable_sleep_mode"] = True
    if spec.broadcast:
        from vllm.config import WeightTransferConfig

        args["weight_transfer_config"] = WeightTransferConfig(backend="vans_broadcast")  # registered by the extension
    if spec.lora_rank:
        args["enable_lora"] = True
        args["max_lora_rank"] = next(r for r in _LORA_RANKS if r >= spec.lora_rank)
        args["max_loras"] = 2  # a new version is served while requests of the old one finish
    return args


def _with_adapter_rank(spec: EngineSpec) -> EngineSpec:
    """Return ``spec`` with room for the adapter it starts from."""
    if spec.adapter is None:
        return spec
    from actors.weights import read_adapter

    rank = int(read_adapter(spec.adapter).adapter_config["r"])
    return replace(spec, lora_rank=max(rank, spec.lora_rank))


def _in_process(spec: EngineSpec) -> bool:
    if spec.in_process is not None:
        return spec.in_process
    return spec.tensor_parallel == 1 and not _on_gpu()


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def prepare_environment(spec: EngineSpec) -> None:
    """Set what vLLM and torch read at import, also where torch has been; a value that is set wins, ``spec.env`` over both."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.enforce_eager:
        defaults["TORCH_COMPILE_DISABLE"] = "1"  # first batch 15 s → 0.5 s on a CPU
    if _in_process(spec):
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.update(spec.env)
    if dynamo := sys.modules.get("torch._dynamo.config"):  # imported already, so it has read the variable
        dynamo.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"  # type: ignore[attr-defined]


def _private_folder() -> Path:
    """Return a new folder for adapters, on tmpfs where there is one; folders of killed engines are removed."""
    shared = Path("/dev/shm")  # noqa: S108 - the folder made in it is private
    root = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    for folder in root.glob("vans-vlm-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"vans-vlm-{os.getpid()}-", dir=root))
