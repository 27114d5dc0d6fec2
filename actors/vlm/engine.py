"""The VLM's sampler: vLLM, with our prompt, our banned tokens, and a weights version on every completion.

Responsible for: turning a :class:`CompletionRequest` into completions, and for switching weights without mixing versions. Not
responsible for: how vLLM is run (``actors.vlm.backends``), Ray (``actors.vlm.worker``), log-probabilities for training
(``actors.vlm.policy``, which agrees with this one).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actors.failures import BadSampleError, InfrastructureError
from actors.learner.adapters import Layers, fit, linear_layers
from actors.loading import require_whole, shapes_of
from actors.records import Completion, CompletionRequest, VideoQuestion, Weights
from actors.vlm.backends import AsyncBackend, Backend, InProcessBackend
from actors.vlm.engine_args import (
    EngineSpec,
    engine_args,
    in_process,
    on_gpu,
    prepare_environment,
    private_folder,
    with_adapter_rank,
)
from actors.vlm.inputs import PromptEncoder, video_prompt
from actors.vlm.loading import load_model
from actors.vlm.prompt import BAN_BIAS, banned_token_ids, check_prompt, decoded
from actors.vlm.servable import PROBE, require_same_tokens, require_servable
from actors.vlm.settings import PROMPT, PromptSection
from cluster.errors import CheckpointError

if TYPE_CHECKING:
    from actors.weights.broadcast import Offer

log = logging.getLogger(__name__)


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
        self._done = dict.fromkeys(("prompts", "prompt_tokens", "completions", "tokens"), 0)
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()
        self._open.set()
        self._load = asyncio.Lock()
        self._full = False  # the live model's weights are no longer the folder's
        self._resting = False
        self._folder: Path | None = None
        self._layers: Layers = {}  # of the model, for adapters to fit in
        self._shapes: dict[str, tuple[int, ...]] = {}  # of its weights, for whole models to fit
        self._tied: set[str] = set()
        self.config: dict[str, Any] = {}
        """The model's configuration with all its values, once it is loaded."""

    async def start(self) -> None:
        """Load the model. Raises CheckpointError for a folder that is no VLM, not whole, or that vLLM cannot serve; ConfigError where
        its tokenizer cannot write what the prompt asks for; InfrastructureError where another attempt may succeed.
        """
        self.spec = with_adapter_rank(self.spec)
        prepare_environment(self.spec)
        # Before vLLM has it: its errors are not for people. The layers are for adapters to fit in.
        model, self.processor = load_model(self.spec.model_path, empty=True)
        check_prompt(self.processor.tokenizer, self.spec.prompt)
        self._layers, self._shapes, self.config = linear_layers(model), shapes_of(model), model.config.to_dict()
        self._tied = set(model.state_dict()) - set(self._shapes)
        banned = banned_token_ids(self.processor, int(model.config.get_text_config().vocab_size))
        self._bias = dict.fromkeys(banned, BAN_BIAS)
        self._folder = private_folder()
        require_servable(self.spec.model_path, bool(self.spec.lora_rank))
        backend = InProcessBackend if in_process(self.spec) else AsyncBackend
        self._backend = backend(engine_args(self.spec))
        await self._backend.start()
        try:
            await self._compare_tokens(model.config)
        except CheckpointError:
            self.close()
            raise
        await self._backend.rpc("vans_count_videos")
        if self.spec.settings.grouped_lora and self.spec.lora_rank and not on_gpu():
            await self._backend.rpc("vans_group_lora")
        await self._serve_base(0)

    async def _compare_tokens(self, config: Any) -> None:
        """Raise CheckpointError unless vLLM reads a prompt in the learner's tokens. It is read once, and forgotten."""
        path, prompt = self.spec.model_path, self.spec.prompt
        (ours,) = PromptEncoder(self.processor, config, engine_dtype=self.spec.settings.dtype, prompt=prompt).encode(
            [PROBE]
        )
        params = self._sampling(CompletionRequest("probe", PROBE, 1, 0, 0.0, max_tokens=1))
        if len(ours.input_ids) >= self.spec.settings.max_model_len:
            raise CheckpointError(
                f"{path}: {len(PROBE.frames)} frames and a word are {len(ours.input_ids)} tokens, and pools.vlm.max_model_len="
                f"{self.spec.settings.max_model_len} leaves no room for an answer; raise it"
            )
        try:
            output = await self.backend.generate(engine_prompt(self.processor, PROBE, prompt), params, None)
        except (ValueError, _client_error()) as error:
            raise CheckpointError(f"{path}: vLLM cannot take a prompt with a video: {error}") from error
        require_same_tokens(path, self.processor, ours.input_ids, output.prompt_token_ids)
        await self.backend.drop_caches()

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
        prompt = engine_prompt(self.processor, request.asked, self.spec.prompt)
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
        self._done["prompts"] += 1
        self._done["prompt_tokens"] += len(output.prompt_token_ids)
        self._done["completions"] += len(completions)
        self._done["tokens"] += sum(len(each.token_ids) for each in completions)
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
                await self._serve_adapter(weights, new, f"the published weights of version {new}")
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
            from actors.weights.transport import as_tensors

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
        """Return what was done since the start: the videos that the vision tower encoded, and the completions that needed one;
        prompts that were answered, their tokens, completions, and the tokens that were sampled.
        """
        encoded = await self.backend.rpc("vans_videos_encoded")
        done = {name: float(count) for name, count in self._done.items()}
        return {"videos": float(encoded), "videos_asked": float(self._asked), **done}

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
            from actors.weights.files import read_adapter

            await self._serve_adapter(read_adapter(self.spec.adapter, 0), version, self.spec.adapter)
        else:
            await self._on_base(None, version)

    async def _on_base(self, adapter: _Adapter | None, version: int) -> None:
        """Serve ``adapter`` (None: none) on the model folder's own weights, whatever was served before."""
        if not self._full:
            await self._switch(adapter, version)
            return
        model, _ = load_model(self.spec.model_path, "float32")
        await self._reload(model.state_dict(), adapter, version)
        self._full = False

    async def _serve_adapter(self, weights: Weights, version: int, where: str) -> None:
        from vllm.lora.request import LoRARequest

        from actors.weights.files import write_adapter

        rank = int(weights.adapter_config.get("r", 0))
        if rank > self.spec.lora_rank:
            raise CheckpointError(
                f"an adapter of rank {rank} was published to an engine started with lora_rank={self.spec.lora_rank}; "
                "start the VLM pool with the rank of the run (stage1.lora.rank)"
            )
        # vLLM serves a tensor whose name it does not find as if it were not there.
        fitted = fit(weights.tensors, weights.adapter_config, self._layers, "vlm", where)
        weights = replace(
            weights,
            tensors=fitted.apply(weights.tensors),
            bf16=frozenset(fitted.names[name] for name in weights.bf16),
            adapter_config=fitted.configured(weights.adapter_config),
        )
        assert self._folder is not None
        # An id of its own for every load: vLLM keeps adapters and prefix caches by id and name.
        self._lora_ids += 1
        name = f"v{version}-{self._lora_ids}"
        folder = write_adapter(weights, self._folder / name)
        await self._on_base(_Adapter(LoRARequest(name, self._lora_ids, str(folder)), Path(folder)), version)

    async def _serve_full(self, weights: Weights, version: int) -> None:
        from actors.weights.transport import as_tensors

        # vLLM drops a tensor whose name it does not know, and keeps its old value for one that is missing.
        require_whole(weights.tensors, self._shapes, f"the published weights of version {version}", self._tied)
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
            top_p=request.top_p,
            top_k=0,
            seed=None if greedy else request.seed % (1 << 62),
            max_tokens=request.max_tokens,
            logprobs=0,
            logit_bias=self._bias,
            detokenize=not self.spec.settings.text_at_end,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, version: int) -> Completion:
        ids = np.asarray(output.token_ids, dtype=np.int32)
        logprobs = [entry[int(token)].logprob for entry, token in zip(output.logprobs, ids, strict=True)]
        return Completion(
            text=self._text(output.token_ids) if self.spec.settings.text_at_end else output.text,
            token_ids=ids,
            logprobs=np.asarray(logprobs, dtype=np.float32),
            finish_reason=str(output.finish_reason),
            weights_version=version,
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        # Of a character that was cut off, nothing is shown.
        return decoded(self.processor.tokenizer, token_ids).rstrip("\N{REPLACEMENT CHARACTER}")


def engine_prompt(processor: Any, asked: VideoQuestion, prompt: PromptSection = PROMPT) -> dict[str, Any]:
    """Return ``asked`` as vLLM takes it. Raises BadSampleError where it cannot be used."""
    shown = video_prompt(processor, asked, prompt)
    video = (shown.frames, {**shown.metadata, "do_sample_frames": False})
    return {
        "prompt": shown.text,
        "multi_modal_data": {"video": video},
        # Of Qwen2.5-VL, vLLM does not read it from the video's own facts: a folder that samples would drop frames.
        "mm_processor_kwargs": {"do_sample_frames": False},
    }


def _client_error() -> type[Exception]:
    """Return vLLM's class of errors that are the request's own fault."""
    from vllm.exceptions import VLLMClientError

    return VLLMClientError
