"""What a learner group is told: frozen values, no behaviour beyond checks and the learning rate as a function of the
step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.learner.objectives.settings import GrpoSection, ObjectiveSection
from actors.learner.settings import OptimSection
from actors.policy.settings import LoraSection
from actors.weights.broadcast import BroadcastSpec

OFFLOADS = ("none", "optimizer", "all")


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (0 is the first).

    Linear warm-up over ``warmup_steps`` (step 0 already has lr / warmup_steps), then constant, or a cosine or linear
    descent that reaches 0 at ``total_steps``; beyond it stays 0. A pure function of the step, so nothing is there to
    restore.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    span = max(total_steps - optim.warmup_steps, 1)
    done = min((step - optim.warmup_steps) / span, 1.0)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.lr * (1.0 - done)


@dataclass(frozen=True)
class LearnerSpec:
    """One learner group: which policy, how it is sharded, and how it learns.

    ``kind`` is ``vlm``, ``vdm`` or a dotted path ``module:Class`` of a Trainable with the same ``load``.
    ``lora=None`` trains the full weights. ``dtype`` is the compute dtype; parameters and optimizer stay float32.
    ``total_steps`` (optimizer steps) is where cosine and linear schedules end. ``broadcast`` offers full weights by broadcast
    too, beside the object store. ``offload`` moves the optimizer's state, or all that the learner holds, to host memory
    between calls.
    """

    kind: str
    model_path: str
    adapter_path: str | None = None
    lora: LoraSection | None = None
    ranks: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    dtype: str = "float32"
    micro_batch: int = 16
    micro_steps: int | None = (
        None  # steps of a trajectory per forward and backward, where the policy can split; None: all
    )
    activation_checkpointing: bool = False
    reference_offload: bool = False  # the frozen copy's shards rest in host memory
    objective: str = "grpo"  # a name in actors.learner.objectives.table
    learning: ObjectiveSection = field(default_factory=GrpoSection)  # the objective's settings
    longest: int = (
        0  # steps of the longest possible trajectory, e.g. the token limit: the divisor of loss_norm=constant
    )
    optim: OptimSection = field(default_factory=OptimSection)
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    start_timeout_s: float = 300.0
    step_timeout_s: float = 600.0
    name: str = "learner"
    total_steps: int = 0
    broadcast: BroadcastSpec | None = None
    offload: Literal["none", "optimizer", "all"] = "none"

    def __post_init__(self) -> None:
        if self.offload not in OFFLOADS:
            raise ValueError(f"{self.name}: offload={self.offload!r} is unknown; use {', '.join(OFFLOADS)}")
        if self.ranks < 1 or self.micro_batch < 1 or (self.micro_steps or 1) < 1:
            raise ValueError(
                f"{self.name}: ranks={self.ranks}, micro_batch={self.micro_batch} and micro_steps={self.micro_steps} "
                "must be at least 1"
            )
        if self.optim.schedule != "constant" and self.total_steps < 1:
            raise ValueError(
                f"{self.name}: schedule={self.optim.schedule} needs total_steps >= 1 to know where it ends"
            )
