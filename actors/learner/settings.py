"""Settings of a learner, as a run's YAML and the learner itself read them. No torch: the command line reads them.

Responsible for keys, defaults and ranges. The objectives' own are in ``objectives.settings``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from actors.settings import Pair, Section, cite


class OptimSection(Section):
    """AdamW and what surrounds it."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate. Paper: 5e-5.", json_schema_extra=cite("VANS"))
    betas: Pair = Field((0.9, 0.999), description="AdamW betas.", json_schema_extra=cite("AdamW"))
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.", json_schema_extra=cite("AdamW"))
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps over which the rate climbs linearly to lr; 0 starts there.",
        json_schema_extra=cite("warm-up"),
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="Rate after warm-up: lr throughout, or a cosine or linear descent to 0 at the stage's last planned step.",
        json_schema_extra=cite("cosine"),
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping by global norm.")
    max_skipped_steps: int = Field(
        5, ge=0, description="Non-finite gradients skip a step; more than this stop the run."
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per optimizer step of a moving average of the trained weights; it is what is exported and "
        "evaluated, while rollouts use the weights themselves. 0 keeps none.",
        json_schema_extra=cite("Flow-GRPO", "DiffusionNFT"),
    )
