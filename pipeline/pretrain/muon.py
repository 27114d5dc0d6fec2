"""Muon: momentum whose matrix is orthogonalised, which trains these small networks in about half the steps of Adam.

Responsible for the optimizer of the pretraining loops. The method is Jordan et al. 2024 (kellerjordan.github.io/posts/muon):
momentum, five Newton-Schulz iterations with the quintic's published coefficients, step scaled by sqrt(rows / columns).
torch's own Muon takes 2-D weights only; a causal VAE is made of 5-D ones, which are flattened to (out, rest) here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_NOT_MATRICES = (
    "embed_tokens",
    "shared",
    "token_embedding",
    "position_embedding",
    "pos_embed",
    "relative_attention_bias",
)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: singular values of ``matrix`` (r, c) are brought to about 1."""
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for weights of two and more dimensions."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients in place."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1.0 - group["momentum"])
                direction = orthogonalise(p.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(direction.view_as(p), alpha=-group["lr"] * scale)


class MuonAdam:
    """Muon for a module's weight matrices and kernels, AdamW for everything else, behind one optimizer's methods."""

    def __init__(self, module: nn.Module, *, lr: float, adam_lr: float, weight_decay: float = 0.0) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in module.named_parameters():
            wide = p.ndim >= 2 and p.shape[0] >= 8 and p[0].numel() >= 8
            (matrices if wide and not any(part in name for part in _NOT_MATRICES) else others).append(p)
        self._parts = (
            Muon(matrices, lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._rates = (lr, adam_lr)
        self._params = [*matrices, *others]

    def step(self, scale: float, clip: float = 1.0) -> None:
        """Clips the gradients' norm, takes one step at ``scale`` times the rates, and clears the gradients."""
        nn.utils.clip_grad_norm_(self._params, clip)
        for part, rate in zip(self._parts, self._rates, strict=True):
            part.param_groups[0]["lr"] = rate * scale
            part.step()
            part.zero_grad()
