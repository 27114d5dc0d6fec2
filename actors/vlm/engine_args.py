"""How vLLM is run: what the VLM pool's settings come to as vLLM's arguments, its environment, and a folder for adapters.

Not responsible for running it (``actors.vlm.backends``) or for requests (``actors.vlm.engine``).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from actors.learner.adapters import plain_lora
from actors.vlm.loading import processor_options
from actors.vlm.settings import PROMPT, PromptSection, VlmPoolSection

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
    "TOKENIZERS_PARALLELISM": "false",
}
"""What vLLM reads at its import, unless it is set."""
EAGER = {"TORCH_COMPILE_DISABLE": "1"}  # first batch 15 s → 0.5 s on a CPU

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be told


@dataclass(frozen=True)
class EngineSpec:
    """One engine. ``lora_rank``: the largest adapter rank that will be published; 0 switches LoRA off."""

    model_path: str
    settings: VlmPoolSection = field(default_factory=VlmPoolSection)  # ``rest``: on a GPU, it can give up its memory
    prompt: PromptSection = PROMPT
    lora_rank: int = 0
    adapter: str | None = None  # PEFT folder that is part of the base weights (version 0)
    in_process: bool | None = None  # None: in this process without a GPU, in vLLM's own processes with one
    max_num_seqs: int = 256
    broadcast: bool = False  # full weights may come by broadcast, through vLLM's native weight transfer
    alone: bool = False  # one sequence at a time, nothing reused: no figure depends on what shares a batch
    env: dict[str, str] = field(default_factory=dict)


def common_args(max_model_len: int, *, gpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM that every engine here has, whatever it is asked."""
    args: dict[str, Any] = {
        "load_format": "safetensors",  # nothing is unpickled
        # The folder's generation_config must not bend top_p or penalties behind our back.
        "generation_config": "vllm",
        "disable_log_stats": True,
    }
    if not gpu:
        # On a CPU, vLLM 0.32 dies of a seeded request whose prompt is prefilled in chunks ("CPU Generator does not use
        # offset"), so prompts are prefilled whole.
        args |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}
    return args


def engine_args(spec: EngineSpec) -> dict[str, Any]:
    """Return the arguments of vLLM's engine. Raises CheckpointError for a folder that is no model of a known make."""
    args: dict[str, Any] = common_args(spec.settings.max_model_len, gpu=on_gpu()) | {
        "model": spec.model_path,
        "dtype": spec.settings.dtype,
        "max_model_len": spec.settings.max_model_len,
        "gpu_memory_utilization": spec.settings.gpu_memory_utilization,
        "tensor_parallel_size": spec.settings.tensor_parallel,
        "enforce_eager": spec.settings.enforce_eager,
        "max_num_seqs": 1 if spec.alone else spec.max_num_seqs,
        "limit_mm_per_prompt": {"video": 1, "image": 0},
        "skip_mm_profiling": True,
        "mm_processor_kwargs": processor_options(spec.model_path),
        "mm_processor_cache_gb": 1.0,
        # The log-probabilities of the distribution that was sampled from: after the ban and the temperature.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "actors.vlm.extension.WeightsExtension",
        "seed": 0,
    }
    if spec.alone:
        args["enable_prefix_caching"] = False
    if spec.settings.kv_cache_mib is not None:
        args["kv_cache_memory_bytes"] = spec.settings.kv_cache_mib << 20
    if spec.settings.rest and on_gpu():
        args["enable_sleep_mode"] = True
    if spec.broadcast:
        from vllm.config import WeightTransferConfig

        args["weight_transfer_config"] = WeightTransferConfig(backend="vans_broadcast")  # registered by the extension
    if spec.lora_rank:
        args["enable_lora"] = True
        args["max_lora_rank"] = next(r for r in _LORA_RANKS if r >= spec.lora_rank)
        args["max_loras"] = 2  # a new version is served while requests of the old one finish
    return args


def with_adapter_rank(spec: EngineSpec) -> EngineSpec:
    """Return ``spec`` with room for the adapter it starts from."""
    if spec.adapter is None:
        return spec
    from actors.weights.files import read_adapter

    rank = int(plain_lora(read_adapter(spec.adapter).adapter_config, spec.adapter).r)
    return replace(spec, lora_rank=max(rank, spec.lora_rank))


def in_process(spec: EngineSpec) -> bool:
    """Return whether vLLM runs in this process."""
    if spec.in_process is not None:
        return spec.in_process
    return spec.settings.tensor_parallel == 1 and not on_gpu()


def on_gpu() -> bool:
    """Return whether there is a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def prepare_environment(spec: EngineSpec) -> None:
    """Set what vLLM and torch read at import, also where torch has been; a value that is set wins, ``spec.env`` over both."""
    defaults = ENVIRONMENT | (EAGER if spec.settings.enforce_eager else {})
    if in_process(spec):
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.update(spec.env)
    if dynamo := sys.modules.get("torch._dynamo.config"):  # imported already, so it has read the variable
        dynamo.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"  # type: ignore[attr-defined]


def private_folder() -> Path:
    """Return a new folder for adapters, on tmpfs where there is one; folders of killed engines are removed."""
    shared = Path("/dev/shm")  # noqa: S108 - the folder made in it is private
    root = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    for folder in root.glob("vans-vlm-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"vans-vlm-{os.getpid()}-", dir=root))
