"""The exponential moving average of trained weights: smoother than the last step, so it is what gets evaluated.

Flow-GRPO (arXiv 2505.05470) and DiffusionNFT (arXiv 2509.16117) sample with the weights and evaluate with their
average; so do the RL learner and supervised training here. Works on plain and on sharded (FSDP2) parameters: each rank
averages its own shard, which needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from actors.learner.sharding import gather_state


class Copy:
    """A second set of values of ``parameters``, which they can take on for a while."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = [_local(p).clone() for p in self.parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the parameters hold these values; afterwards they are what they were, bit for bit."""
        held = [_local(p).clone() for p in self.parameters]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(held)

    def gather(self, module: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
        """Return ``gather_state`` of ``module``, whose parameters these are, with these values in them. Collective."""
        with self.applied():
            # Copies: with one rank what is gathered shares the parameters' memory, which gets its own values back.
            return {name: t.clone() for name, t in gather_state(module, trainable_only).items()}

    def state(self) -> dict[str, Tensor]:
        """Return the values as tensors that share its memory and are sharded as the parameters are.

        A distributed checkpoint writes them and, read in place by any number of ranks, restores them.
        """
        return {str(i): _like(v, p) for i, (v, p) in enumerate(zip(self.values, self.parameters, strict=True))}

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            _local(parameter).copy_(value)


class Average(Copy):
    """Average of ``parameters``: m ← d·m + (1 − d)·p with d = min(decay, (1 + step)/(10 + step)).

    The growing decay forgets the start: after few steps the average is near the weights (the schedule of diffusers'
    ``EMAModel``). ``decay`` is in (0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay={decay} must be in (0, 1); keep no average instead of one that never moves")
        super().__init__(parameters)
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step ``step`` (0 is the first)."""
        weight = 1.0 - min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self.values, [_local(p) for p in self.parameters], weight)


class Behaviour(Copy):
    """The weights that sample, which follow those that learn (DiffusionNFT, arXiv 2509.16117: v_old).

    ``same``: the parameters are known to hold these values, so that nothing needs to be copied to take them on.
    """

    same = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """As :meth:`Copy.applied`, without copying where the values are the same."""
        if self.same:
            yield
            return
        with super().applied():
            yield

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Keep the share ``decay`` (0…1) of themselves, and take the rest from the parameters; 0 takes them as they are."""
        self.same = decay == 0.0
        if self.same:
            torch._foreach_copy_(self.values, [_local(p) for p in self.parameters])
        else:
            torch._foreach_lerp_(self.values, [_local(p) for p in self.parameters], 1.0 - decay)


def _local(parameter: nn.Parameter) -> Tensor:
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
