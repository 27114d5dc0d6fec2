"""DiffusionNFT: learn from good and bad clips by the forward process (arXiv 2509.16117)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actors.learner.objectives.forward import ForwardProcess
from actors.learner.objectives.settings import NftSection


class Nft(ForwardProcess):
    """With r = 1/2 + 1/2 clip(A / A_max, -1, 1) a clip is good with weight r and bad with weight 1 - r.

    The implicit velocities are v+ = v_old + beta (v - v_old) and v- = v_old - beta (v - v_old). Where the clip is good, v+ shall
    reach it; where it is bad, v- shall. Each branch is a squared error of x0 = x - sigma v±, divided by its own mean absolute
    error (a constant for the gradient), so that all noise levels weigh alike:

    loss = (r L(v+) + (1 - r) L(v-)) / beta.
    """

    settings: NftSection

    @property
    def behaviour_decay(self) -> float:  # type: ignore[override]
        """Share that the weights that sample keep of themselves."""
        return self.settings.behaviour_decay

    def losses(
        self, velocity: Tensor, old: Tensor, reference: Tensor | None, noised: Any, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each clip (B,), and the share r with which it counts as good."""
        beta = self.settings.beta
        good = 0.5 + 0.5 * (advantages / self.settings.advantage_max).clamp(-1.0, 1.0)
        move = beta * (velocity - old)
        loss = (good * _branch(old + move, noised) + (1.0 - good) * _branch(old - move, noised)) / beta
        return loss, {"good": good}


def _branch(velocity: Tensor, noised: Any) -> Tensor:
    """Return mean (x0_v - x0)^2 / mean |x0_v - x0| of each clip, (B,), the divisor detached."""
    error = (noised.noisy - noised.sigma.view(-1, 1, 1, 1, 1) * velocity - noised.clean).flatten(1)
    scale = error.detach().abs().mean(dim=1).clamp(min=1e-5)
    return torch.mean(error.square(), dim=1) / scale
