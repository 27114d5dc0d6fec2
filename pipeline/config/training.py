"""Sections of supervised training, and what every kind of training has: adapter and optimiser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.learner.settings import OptimSection
from actors.policy.settings import LoraSection
from actors.settings import Positive, Section, cite
from pipeline.support.location import LocalPath, Location


class SftOptimSection(OptimSection):
    """AdamW and what surrounds it, in supervised fine-tuning."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(
        10,
        ge=0,
        description="Optimizer steps over which the rate climbs linearly to lr; 0 starts there.",
        json_schema_extra=cite("warm-up"),
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine",
        description="Rate after warm-up: lr throughout, or a cosine or linear descent to 0 at the last step; max_wall_s "
        "needs constant.",
        json_schema_extra=cite("cosine"),
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per optimizer step of a moving average of the trained weights, which is what is exported; 0 "
        "exports the weights themselves.",
    )


class SftLoraSection(LoraSection):
    """Low-rank adapter that supervised fine-tuning trains; ``rank: 0`` trains all weights."""

    rank: int = Field(0, ge=0, description="LoRA rank; 0 trains the full weights.", json_schema_extra=cite("LoRA"))
    alpha: float = Field(
        32.0, gt=0, description="LoRA alpha; the scaling is alpha/rank.", json_schema_extra=cite("LoRA")
    )


class SftModelSection(Section):
    """Supervised fine-tuning of one model by ``vans sft``: one of steps, epochs and max_wall_s says how long.

    Ranks, GPUs, dtype and activation checkpointing are ``learner``'s, shapes ``video``'s, decoding ``data``'s.
    """

    data: Location | None = Field(
        None, description="Folder of Parquet shards to train on, path or URI; null is data.train."
    )
    out: LocalPath | None = Field(
        None, description="Folder that becomes the tuned model or adapter; null is sft-vlm or sft-vdm in the run's out."
    )
    steps: Positive | None = Field(None, description="Optimizer steps.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="Passes over the data.")
    max_wall_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds of training, all starts of the run together."
    )
    batch: Positive = Field(64, description="Samples per optimizer step, over all ranks; a multiple of learner.ranks.")
    micro_batch: Positive | None = Field(
        None, description="Samples per forward and backward on one rank; null is all of the rank's share."
    )
    optim: SftOptimSection = Field(default_factory=SftOptimSection)
    lora: SftLoraSection = Field(default_factory=SftLoraSection)
    checkpoint_every: int = Field(
        500, ge=0, description="Steps between checkpoints, the last one being kept; 0 writes one at the end only."
    )
    max_failures: int = Field(0, ge=0, description="Times that failed ranks start again from the last checkpoint.")
    log_every: Positive = Field(10, description="Steps between lines of figures.")
    cache_mib: Positive = Field(
        2048,
        description="Memory of a rank for decoded samples; a larger share of the data is decoded anew in each epoch.",
    )

    @model_validator(mode="after")
    def _length(self) -> SftModelSection:
        limits = {name: getattr(self, name) for name in ("steps", "epochs", "max_wall_s")}
        given = [f"{name}={value:g}" for name, value in limits.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)}: give one of steps, epochs and max_wall_s, and null for the others"
            )
        if self.max_wall_s is not None and self.optim.schedule != "constant":
            raise ValueError(
                f"max_wall_s={self.max_wall_s:g} needs optim.schedule=constant, since nobody knows where "
                f"{self.optim.schedule} ends"
            )
        return self


class SftVdmSection(SftModelSection):
    """Supervised fine-tuning of the VDM by ``vans sft``, as of the VLM."""

    train_text_encoder: bool = Field(False, description="Train the text encoder too, with all of its weights.")
    timesteps: Literal["logit_normal", "uniform"] = Field(
        "logit_normal",
        description="How noise levels are drawn, before models.flow_shift: logit-normal, or uniform among 1000, as the release does.",
        json_schema_extra=cite("rectified flow", "VANS as released"),
    )
    weighting: Literal["none", "bell"] = Field(
        "none",
        description="Weight of a level in the loss: equal, or a bell around the middle timestep, as in the release.",
        json_schema_extra=cite("VANS as released"),
    )

    @model_validator(mode="after")
    def _whole_encoder(self) -> SftVdmSection:
        if self.train_text_encoder and self.lora.rank:
            raise ValueError(f"train_text_encoder trains all weights and cannot go with lora.rank={self.lora.rank}")
        return self


class SftSection(Section):
    """Supervised fine-tuning of either model, before Joint-GRPO."""

    vlm: SftModelSection = Field(default_factory=SftModelSection)
    vdm: SftVdmSection = Field(default_factory=SftVdmSection)
