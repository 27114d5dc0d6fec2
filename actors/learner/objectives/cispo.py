"""CISPO: clipped importance weights, a gradient for every token (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from torch import Tensor

from actors.learner.objectives.grpo import Grpo


def cut_weights(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return −sg(clip(ρ, 1 − clip_low, 1 + clip_high)) A log π per step, (B, T), where sg stops the gradient (eq. 4 and 5)."""
    return -ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs


class Cispo(Grpo):
    """The policy gradient with cut importance weights: rare tokens whose ratio leaves the clip range still learn.

    While the weights are those that sampled, ρ is 1 and the gradient is GRPO's. The value of the loss is no measure of
    progress: it holds log π itself.
    """

    surrogate = staticmethod(cut_weights)

    def gate_tolerance(self, dtype: str) -> float | None:
        """A fifth of PPO's usual clip range: this objective's own says nothing of how far passes may differ."""
        return 0.2 / 5 if self.settings.old_logprobs == "learner" else None
