"""Settings of the vLLM engines, as a run's YAML and the engine itself read them. No torch: the command line reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from actors.pool.settings import PoolSection
from actors.settings import Positive


class VlmPoolSection(PoolSection):
    """vLLM engines."""

    max_batch: Positive = Field(1, description="Most requests in one call of a worker; vLLM batches by itself.")
    max_inflight: Positive = Field(64, description="Requests inside one engine at once.")
    max_model_len: Positive = Field(512, description="vLLM's context length in tokens.")
    kv_cache_mib: Positive | None = Field(256, description="KV cache per engine in MiB; null lets vLLM decide (GPU).")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Engine dtype.")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="vLLM's share of the GPU's memory.")
    tensor_parallel: Positive = Field(1, description="GPUs per engine.")
    enforce_eager: bool = Field(True, description="Skip graph capture; false is faster on GPUs after a slower start.")
    grouped_lora: bool = Field(
        True,
        description="On a CPU, add an adapter to all its tokens by one matrix product, where vLLM gathers it for each token. "
        "Log-probabilities differ by float noise. GPUs have vLLM's own kernels.",
    )
    text_at_end: bool = Field(
        True,
        description="Make a completion's text once it has ended, where vLLM makes it token by token: the same text, less work for each "
        "token.",
    )

    @property
    def receivers(self) -> int:
        """One for each GPU of an engine."""
        return self.tensor_parallel

    @model_validator(mode="after")
    def _whole_gpus(self) -> VlmPoolSection:
        if self.gpus > 0 and self.tensor_parallel > 1 and self.gpus != self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} with gpus={self.gpus:g}: an engine over {self.tensor_parallel} GPUs needs "
                f"gpus: {self.tensor_parallel} (one bundle, so all of them are on one node)"
            )
        return self
