"""What the trainer asks of a way to learn, and what it gets back. An objective decides the loss; the trainer decides the order.

To add one: a module with a class of this protocol, its settings in ``settings``, a row in ``table``, and the name among the
choices of a stage's ``objective``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from actors.learner.batches import MicroBatch
from actors.learner.objectives.settings import ObjectiveSection
from actors.policy.protocol import PolicyOutput, Trainable


@dataclass
class RankReport:
    """One rank's share of an update's figures: the group adds ``sums``, takes the largest of ``maxima``; ``common``
    is equal.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    maxima: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    common: dict[str, float] = field(default_factory=dict)


@dataclass
class Prepared:
    """A collated micro-batch with what does not depend on the current weights."""

    micro: MicroBatch
    batch: Any
    advantages: Tensor  # (B,)
    rollout: Tensor  # (B, T); T is 0 where the sampler gave no log-probabilities
    old: PolicyOutput | None = None  # of the policy before the first update, detached


@dataclass
class LossStats:
    """What a likelihood ratio did: detached sums over a micro-batch's masked steps. Add them over micro-batches and ranks, then
    divide by ``steps``.
    """

    steps: float  # masked steps (tokens or SDE steps)
    ratio: float  # sum of the ratios
    clipped: float  # steps whose ratio was clipped against the advantage
    clipped_low: float  # … below 1 − clip_low
    clipped_high: float  # … above 1 + clip_high
    truncated: float  # steps whose importance weight was cut at its cap
    bounded: float  # steps of which a log-ratio was cut at LOG_RATIO_BOUND before exp
    kl: float  # sum of the KL estimates
    ratio_max_dev: float  # max |log ratio|; combine by max


@dataclass
class Part:
    """What came of one forward: a loss that is not yet divided by the count, its figures, and the policy's output."""

    loss: Tensor
    sums: dict[str, float]  # detached, over masked steps
    deviation: float = 0.0  # of the gate, where this is the first step after a rollout
    output: PolicyOutput | None = None


class Models(Protocol):
    """The weights that an objective may compute with."""

    policy: Trainable

    def reference(self) -> AbstractContextManager[None]:
        """Within it, ``policy`` is the reference: without its adapter, or the frozen copy."""

    def behaviour(self) -> AbstractContextManager[None]:
        """Within it, ``policy`` has the weights that sampled. Not between a forward with gradient and its backward."""


@dataclass(frozen=True)
class Step:
    """Which optimizer step a forward belongs to. ``seed`` and ``number`` make its randomness repeat after a restart."""

    seed: int
    number: int  # optimizer steps since the learner's beginning
    first: bool  # nothing has been learnt from this rollout batch yet
    gate: bool  # the gate is due


class Objective(Protocol):
    """A loss on what was sampled. B trajectories of T steps: tokens, or denoising steps."""

    settings: ObjectiveSection
    keeps_behaviour: bool
    """Whether the trainer keeps the weights that sampled: they are then what is published."""
    behaviour_decay: float
    """Share that those weights keep of themselves after each batch; the rest comes from the learnt ones."""
    gate_name: str
    gate_metric: str

    def gate_tolerance(self, dtype: str) -> float | None:
        """Largest deviation that is believed in the first step after a rollout, with compute ``dtype``; None has no gate."""

    def before(
        self,
        models: Models,
        steps: Sequence[Sequence[Prepared]],
        gate: bool,
        note: Callable[[Prepared, PolicyOutput], None],
    ) -> None:
        """Make what must come from the weights before the first update; ``gate``: in the first step too. Tells ``note``."""

    def part(self, models: Models, item: Prepared, piece: tuple[slice, Any, Tensor | None], step: Step) -> Part:
        """Return the loss of one piece of ``item``: which of its steps, their batch, and how many each trajectory has in all."""

    def count(self, item: Prepared, outputs: Sequence[PolicyOutput]) -> float:
        """Return what ``item`` adds to the count by which the batch's loss is divided; 0 for padding."""
