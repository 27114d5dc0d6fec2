"""Advantage-weighted matching: the flow-matching loss as a likelihood (arXiv 2509.25050)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actors.learner.objectives.forward import ForwardProcess, square
from actors.learner.objectives.grpo import bounded, clipped_surrogate
from actors.learner.objectives.settings import AwmSection


class Awm(ForwardProcess):
    """PPO's clipped surrogate with rho = exp(w (l_old - l)), where l is the flow-matching loss at the same noised clip.

    l = mean (v - (eps - x0))^2 over all latent values. A lower loss is a likelier clip.
    """

    settings: AwmSection

    def losses(
        self, velocity: Tensor, old: Tensor, reference: Tensor | None, noised: Any, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each clip (B,), its ratio, and whether the clip range cut it."""
        low, high = self.settings.clip_low, self.settings.clip_high
        log_ratio = self.settings.weight * (square(old - noised.target) - square(velocity - noised.target))
        ratio = torch.exp(bounded(log_ratio))
        cut = ((ratio < 1.0 - low) & (advantages < 0)) | ((ratio > 1.0 + high) & (advantages > 0))
        loss = clipped_surrogate(velocity, ratio, advantages, low, high)
        return loss, {"ratio": ratio.detach(), "clipped": cut.float()}
