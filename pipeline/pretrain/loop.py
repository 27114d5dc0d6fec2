"""What the pretraining loops share: a learning-rate schedule, an average of weights, a progress callback."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

Tick = Callable[[int, int, float], None]
"""Called after every step with (step, steps, loss)."""


def no_tick(step: int, steps: int, loss: float) -> None:
    """Reports nothing."""


def cosine(step: int, steps: int, warmup: int = 30) -> float:
    """The schedule at ``step``, 0..1: linear warm-up, then a cosine down to 2%."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps))))


class Average:
    """Exponential moving average of a module's parameters; young averages forget faster, so that early steps leave no trace."""

    def __init__(self, module: nn.Module, decay: float = 0.995) -> None:
        self._module = module
        self._decay = decay
        self._count = 0
        self._mean = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present parameters into the average."""
        self._count += 1
        keep = min(self._decay, self._count / (self._count + 20.0))
        for name, p in self._module.named_parameters():
            self._mean[name].lerp_(p, 1.0 - keep)

    @torch.no_grad()
    def store(self) -> None:
        """Writes the average into the module."""
        for name, p in self._module.named_parameters():
            p.copy_(self._mean[name])
