"""Settings of the samplers and of the frozen models before them, as a run's YAML and the workers read them. No torch: the
command line reads them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.pool.settings import PoolSection
from actors.settings import Positive


class VdmPoolSection(PoolSection):
    """Diffusion sampling workers."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of the transformer; latents stay float32."
    )
    max_decode: Positive = Field(
        8, description="Most clips that the VAE decodes at once; 1 needs the least memory, and is what slicing means."
    )
    max_embed: Positive = Field(
        1,
        description="Most captions that the text encoder embeds at once. 1: a caption's embedding does not depend on its batch; "
        "more is faster and changes it by float noise. A deterministic run takes 1.",
    )
    compile_blocks: bool = Field(
        False,
        description="Whether torch compiles the transformer's blocks in the samplers: faster on GPUs after a start of tens of seconds, "
        "the same up to the dtype's noise. A deterministic run takes them as they are.",
    )
    channels_last: bool = Field(
        False,
        description="Whether the VAE's decoder keeps its weights with channels last: faster on CPUs, the same up to float noise.",
    )


class EmbedPoolSection(PoolSection):
    """Frozen models in front of the diffusion transformer (docs/architecture.md): captions are embedded and reference frames
    encoded once, and only here.
    """

    workers: int = Field(
        0,
        ge=0,
        description="Workers to start. 0: each sampler loads the text encoder and the VAE's encoder itself, right for small ones. "
        "From 1 on no sampler holds them.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of the text encoder; the VAE stays float32."
    )
    cache_mib: Positive = Field(
        1024,
        description="Driver memory for embeddings and latents; what falls out of it is made again when it is asked for.",
    )
