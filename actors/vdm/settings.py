"""Settings of the samplers and of the frozen models before them, as a run's YAML and the workers read them. No torch: the
command line reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from actors.pool.settings import PoolSection
from actors.settings import Positive, Section, cite
from actors.vdm.schedules import SCHEDULES, NoiseSchedule
from cluster.errors import ConfigError

WindowKind = Literal["fixed", "progressive", "random"]
WindowPer = Literal["batch", "prompt"]


class ConditioningSection(Section):
    """How the artist sees the input: clean latents before the noisy target, along time.

    Wan image to video is given one frame in channels instead, and takes references: frames alone; take and time say nothing to it.
    """

    references: Literal["frames", "clip"] = Field(
        "frames",
        description="What is encoded: frames, video.reference_frames of the input clip, each alone; or clip, all of it (as many frames "
        "as video.num_frames) through the causal VAE, of whose latent frames take are kept, as the release does.",
        json_schema_extra=cite("VANS", "VANS as released"),
    )
    take: Positive = Field(
        6,
        description="Latent frames kept of a clip, spread evenly, first and last among them; of a clip with fewer some stand twice.",
        json_schema_extra=cite("VANS as released"),
    )
    time: Literal["zero", "shared"] = Field(
        "zero",
        description="Timestep of the reference tokens: zero, they are clean; or shared, the target's, as the release has it.",
        json_schema_extra=cite("VANS as released"),
    )

    def latents(self, frames: int) -> int:
        """Return how many latent frames come of ``frames`` reference frames; of a clip, ``take`` whatever its length."""
        return min(frames, 1) * self.take if self.references == "clip" else frames


@dataclass(frozen=True)
class Tiling:
    """The overlapping tiles that frames go through the VAE in: (height, width) in pixels; None is the VAE's own."""

    tile: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    """From a tile's begin to the next one's; what is beyond it overlaps, and is blended."""

    def start(self, vae: Any) -> None:
        """Have ``vae``, one of diffusers', work in these tiles; raises ConfigError where they do not fill its latents."""
        unit = int(vae.spatial_compression_ratio)
        if odd := [side for side in (*(self.tile or ()), *(self.stride or ())) if side % unit]:
            raise ConfigError(
                f"video.vae_tile and video.vae_stride: this VAE makes one latent of {unit} pixels a side, and {odd[0]} is no multiple"
            )
        (height, width), (down, right) = self.tile or (None, None), self.stride or (None, None)
        vae.enable_tiling(
            tile_sample_min_height=height,
            tile_sample_min_width=width,
            tile_sample_stride_height=down,
            tile_sample_stride_width=right,
        )


SAMPLERS_SHARE = "pools.vdm.context_parallel"
"""The setting of how many processes of a sampler share a clip."""


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
    context_parallel: Positive = Field(
        1,
        description="Processes of one worker that share the tokens of a clip, each on a GPU of its own: for clips that take too long "
        "on one, or too much memory. It divides the artist's attention heads and a clip's tokens. Each holds the whole transformer; "
        "the first alone holds the VAE and the text encoder.",
        json_schema_extra=cite("DeepSpeed-Ulysses"),
    )

    @model_validator(mode="after")
    def _shared_clips(self) -> VdmPoolSection:
        if self.context_parallel == 1:
            return self
        if self.gpus > 0 and self.gpus != self.context_parallel:
            raise ValueError(
                f"context_parallel={self.context_parallel} with gpus={self.gpus:g}: a worker of as many processes needs "
                f"gpus: {self.context_parallel} (one bundle, so all of them are on one node)"
            )
        if self.compile_blocks:
            raise ValueError(
                f"context_parallel={self.context_parallel} with compile_blocks: compiled blocks do not exchange tokens; use one of them"
            )
        return self


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


class SdeSection(Section):
    """Stochastic sampling of the flow (Flow-GRPO, DanceGRPO, MixGRPO window)."""

    schedule: NoiseSchedule = Field(
        "flow",
        description="Noise schedule s(sigma): "
        + ", ".join(f"{name} {row.says}" for name, row in SCHEDULES.items())
        + ".",
        json_schema_extra=cite("Flow-GRPO", "DanceGRPO", "CPS"),
    )
    level: float = Field(
        0.7,
        ge=0,
        description="Noise level: a (flow; cps, at most 1), eta (dance, 0.25-0.3) or sigma_max (wan). 0 is the ODE, from whose steps "
        "nothing can be learnt.",
        json_schema_extra=cite("Flow-GRPO", "DanceGRPO", "CPS"),
    )
    window_size: Positive = Field(
        2,
        description="Stochastic, trained steps per trajectory; the other steps follow the ODE.",
        json_schema_extra=cite("MixGRPO"),
    )
    window_range: Annotated[tuple[int, int], Field(strict=False)] | None = Field(
        None,
        description="Steps [first, last) within which the window moves; default: all whose noise the steps after them can "
        "remove, by the sigma grid (flow_sde.removable_steps).",
        json_schema_extra=cite("MixGRPO", "CPS"),
    )
    window_schedule: WindowKind = Field(
        "random",
        description="How the window moves: not at all, towards the data and over again, or by chance (seeded).",
        json_schema_extra=cite("MixGRPO"),
    )
    window_per: WindowPer = Field(
        "batch",
        description="Whether a rollout batch has one window, or each prompt one of its own that its group shares: then a batch learns "
        "from more of the steps, and a group is still compared at equal steps. prompt needs window_schedule: random.",
        json_schema_extra=cite("Flash-GRPO"),
    )
    window_every: Positive = Field(
        1, description="Steps (rollout batches) between moves of the window.", json_schema_extra=cite("MixGRPO")
    )
    same_latent: bool = Field(
        True, description="All members of a group start from the same noise.", json_schema_extra=cite("DanceGRPO")
    )

    @model_validator(mode="after")
    def _level(self) -> SdeSection:
        most = SCHEDULES[self.schedule].most
        if self.level > most:
            raise ValueError(f"level={self.level}: with schedule={self.schedule} level is at most {most:g}")
        return self

    @model_validator(mode="after")
    def _per_prompt(self) -> SdeSection:
        if self.window_per == "prompt" and self.window_schedule != "random":
            raise ValueError(
                f"window_per=prompt with window_schedule={self.window_schedule}: a prompt's window is drawn by chance; use "
                "window_schedule: random, or window_per: batch"
            )
        return self
