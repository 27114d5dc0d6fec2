"""What the trainer asks of a way to learn, and what it gets back. An objective decides the loss; the trainer decides the order.

To add one: a module with a class of this protocol, its settings in ``settings``, a row in ``table``, and the name among the
choices of a stage's ``objective``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from actors.learner.objectives.settings import GrpoSection


@dataclass
class LossStats:
    """Detached sums over a micro-batch's masked steps; add them over micro-batches and ranks, then divide by
    ``steps``.
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


class Objective(Protocol):
    """A loss on the log-probabilities of what was sampled. B trajectories of T steps: tokens, or SDE steps."""

    settings: GrpoSection

    @property
    def gate_tolerance(self) -> float:
        """Largest |log-ratio| that is believed before the first update, where it should be 0 (the ratio gate)."""

    def normaliser(self, mask: Tensor) -> float:
        """Return what a micro-batch with ``mask`` (B, T) adds to the count by which the batch's loss is divided."""

    def loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        rollout_logprobs: Tensor,
        kl: Tensor | None = None,
        kl_log_ratio: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]:
        """Return the micro-batch's loss, a sum that is not yet divided by the count, and its statistics.

        ``logprobs``, ``old_logprobs`` and ``rollout_logprobs`` are (B, T) float32 of the current policy, of the learner before
        the batch's first update, and of the sampler. ``advantages`` is (B,), ``mask`` (B, T) bool. ``kl`` and
        ``kl_log_ratio`` are (B, T) (see ``grpo.grpo_loss``). ``lengths`` (B,) are whole trajectories' steps where T is a part.
        """
