"""Settings of a learner, as a run's YAML and the learner itself read them. No torch: the command line reads them.

Responsible for keys, defaults and ranges. The objectives' own are in ``objectives.settings``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from actors.pool.settings import Gpus, Labels
from actors.settings import FREE, Pair, Positive, Section, cite
from cluster.errors import ConfigError
from cluster.layout import Strategy


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


LEARNER_SHARES = "learner.context_parallel"
"""The setting of how many ranks share a clip."""


class LearnerSection(Section):
    """One learner group: FSDP2 ranks."""

    ranks: Positive = Field(2, description="Ranks of the group.")
    cpus: float = Field(0.5, ge=0, description="CPU cores reserved per rank.")
    gpus: Gpus = Field(0.0, description="GPUs reserved per rank.")
    labels: Labels = Field(
        default_factory=dict, description="Ray node labels that the ranks' nodes must have, as for pools."
    )
    placement: Strategy | None = Field(
        None,
        description="How the ranks lie on nodes; null is cluster.placement. STRICT_PACK keeps NCCL within one node.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Compute dtype (FSDP2 mixed precision).")
    micro_batch: Positive = Field(16, description="Trajectories per forward and backward on one rank.")
    micro_completions: Positive | None = Field(
        None,
        description="Completions per forward and backward on one rank (the thinker); null takes micro_batch. They have far fewer "
        "tokens than trajectories, and a whole group at once reads its prompt once.",
    )
    shared_prompts: bool = Field(
        True,
        description="Whether a forward over several completions of one prompt reads the prompt, video included, once for all of "
        "them, instead of once for each. Log-probabilities differ by float noise.",
    )
    micro_steps: Positive | None = Field(
        None,
        description="Denoising steps of a trajectory's window per forward and backward (stage 2): 1 keeps the activations of one "
        "step at a time; null takes the whole window.",
    )
    context_parallel: Positive = Field(
        1,
        description="Neighbouring ranks that share the tokens of a clip, in stage 2's learner: for clips whose activations outgrow a "
        "GPU. It divides ranks, the artist's attention heads and a clip's tokens. The thinker's ranks and vans sft share nothing.",
        json_schema_extra=cite("DeepSpeed-Ulysses"),
    )
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    reference_offload: bool = Field(
        False,
        description="With lora.rank 0 and a KL: keep the frozen reference model's shards in host memory while they are not "
        "computed with. With LoRA the reference is the model without its adapter, and costs nothing.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="What the learner moves to host memory while it does not work: the optimizer's state and the moving average, or "
        "all of its weights too (docs/weights.md).",
        json_schema_extra=FREE,
    )
    start_timeout_s: float = Field(300.0, gt=0, description="Deadline to start and load.", json_schema_extra=FREE)
    step_timeout_s: float = Field(
        600.0, gt=0, description="Deadline for one call on all ranks.", json_schema_extra=FREE
    )
    max_restarts: int = Field(
        2,
        ge=0,
        description="Times per stage that a group which lost a rank is started anew from the newest checkpoint; 0 stops the run "
        "instead, for --resume.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> LearnerSection:
        if self.ranks % self.context_parallel:
            raise ValueError(
                f"context_parallel={self.context_parallel} must divide ranks={self.ranks}: ranks share a clip in groups of that many"
            )
        return self

    def sharers(self, policy: str) -> int:
        """Return how many ranks share each item of ``policy``: only the artist's clips are shared."""
        return 1 if policy == "vlm" else self.context_parallel

    def at_once(self, policy: str) -> int:
        """Return how many trajectories, or completions, of ``policy`` (vlm, vdm) one rank's forward and backward takes."""
        return (self.micro_completions if policy == "vlm" else None) or self.micro_batch


def require_divisor(count: int, sizes: Mapping[str, int], key: str = LEARNER_SHARES) -> None:
    """Raise ConfigError unless ``count``, the value of ``key``, divides all of ``sizes``, which are named as a sentence names them."""
    if all(size % count == 0 for size in sizes.values()):
        return
    common = math.gcd(*sizes.values())
    right = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    told = " and ".join(f"{name} ({size})" for name, size in sizes.items())
    raise ConfigError(f"{key}={count} must divide {told}: use one of {right}")
