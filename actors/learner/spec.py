"""What a learner group is told: frozen values, no behaviour beyond checks and the learning rate as a function of the
step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from actors.learner.objectives.settings import GrpoSection, ObjectiveSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.policy.settings import LoraSection
from actors.weights.broadcast import BroadcastSpec


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
    ``lora=None`` trains the full weights. Parameters and optimizer are float32 whatever the compute dtype.
    ``total_steps`` (optimizer steps) is where cosine and linear schedules end. ``broadcast`` offers full weights by broadcast
    too, beside the object store.
    """

    kind: str
    model_path: str
    settings: LearnerSection = field(default_factory=LearnerSection)
    adapter_path: str | None = None
    lora: LoraSection | None = None
    objective: str = "grpo"  # a name in actors.learner.objectives.table
    learning: ObjectiveSection = field(default_factory=GrpoSection)  # the objective's settings
    longest: int = (
        0  # steps of the longest possible trajectory, e.g. the token limit: the divisor of loss_norm=constant
    )
    optim: OptimSection = field(default_factory=OptimSection)
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str = "learner"
    total_steps: int = 0
    broadcast: BroadcastSpec | None = None

    def __post_init__(self) -> None:
        if self.optim.schedule != "constant" and self.total_steps < 1:
            raise ValueError(
                f"{self.name}: schedule={self.optim.schedule} needs total_steps >= 1 to know where it ends"
            )
