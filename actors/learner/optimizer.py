"""The optimizer's step and state, for the learner and for supervised training: clip, step or skip, average, checkpoint.

Responsible for what happens to parameters once their gradients are there. Not responsible for the gradients, for which weights sample,
or for who writes a checkpoint and when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from actors.learner.average import Average
from actors.learner.checkpoint import load_tensors, optimizer_tensors
from actors.learner.settings import OptimSection
from actors.learner.spec import learning_rate
from actors.policy.protocol import trainable_parameters
from cluster.errors import TrainingError


@dataclass(frozen=True)
class Stepped:
    """One step: whether it was ``applied`` or skipped, its learning rate, and the global norm of the gradients before clipping."""

    applied: bool
    lr: float
    grad_norm: float


class Optimizer:
    """AdamW over the trained parameters of a (sharded) ``module``, and their moving average where ``optim.ema`` asks for one.

    Methods are collectives: all ranks call the same ones in the same order. ``total_steps`` is where the learning rate's descent ends.
    """

    def __init__(self, module: nn.Module, optim: OptimSection, total_steps: int, name: str) -> None:
        self.module, self.optim, self.total_steps, self.name = module, optim, total_steps, name
        self.parameters = trainable_parameters(module)
        if not self.parameters:
            raise TrainingError(f"{name}: the policy has no parameter that requires grad, so there is nothing to train")
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, foreach=True
        )
        self.average = Average(self.parameters, optim.ema) if optim.ema > 0 else None
        self.steps = 0  # tried, skipped ones included; drives the learning rate
        self.skipped = 0

    @property
    def applied(self) -> int:
        """Steps that changed the parameters."""
        return self.steps - self.skipped

    def step(self, loss: float) -> Stepped:
        """Clip the gradients and step; where the batch's ``loss`` or their norm is not finite, the step is skipped instead.

        ``loss`` is equal on all ranks, so all of them skip together. Raises TrainingError where that is one too many.
        """
        optim = self.optim
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, optim.max_grad_norm, foreach=True)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # equal on all ranks
        lr = learning_rate(optim, self.steps, self.total_steps)
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        if finite:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            if self.average is not None:
                self.average.update(self.applied)
        else:
            self.skipped += 1
        self.steps += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.skipped > optim.max_skipped_steps and not finite:
            raise TrainingError(
                f"{self.name}: {self.skipped} optimizer steps had a non-finite loss or gradient (loss {loss}, gradient norm "
                f"{grad_norm}), more than max_skipped_steps={optim.max_skipped_steps}; lower the learning rate (now {lr:g}), or "
                "look at the inputs of this batch, and at their rewards"
            )
        return Stepped(finite, lr, grad_norm)

    def held(self) -> Iterator[Tensor]:
        """Yield what it holds beside the parameters: AdamW's moments and the average."""
        for state in self.adamw.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        if self.average is not None:
            yield from self.average.values

    def tensors(self) -> dict[str, Any]:
        """Return trained parameters, moments and average as a checkpoint stores them."""
        return self._states()[1]

    def restore(self, folder: str, more: Mapping[str, Any]) -> dict[str, Any]:
        """Read what :meth:`tensors` gave, and ``more`` beside it, from ``folder``, by any number of ranks; returns ``more`` as read.

        Counters are the caller's. Raises CheckpointError for a folder that is damaged, or of other parameters.
        """
        optimizer, state = self._states()
        state |= more
        load_tensors(state, folder)
        set_state_dict(
            self.module,
            self.adamw,
            model_state_dict=state["model"],
            optim_state_dict=optimizer,
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        return {name: state[name] for name in more}

    def _states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return AdamW's state dict, and all tensors as they are stored."""
        if not self.adamw.state:  # torch fills it by a step of rate 0, which would count as the first one
            get_state_dict(self.module, self.adamw)
            for values in self.adamw.state.values():
                values["step"].zero_()
        model, optimizer = get_state_dict(self.module, self.adamw, options=StateDictOptions(ignore_frozen_params=True))
        tensors: dict[str, Any] = {"model": model, "optimizer": optimizer_tensors(optimizer)}
        if self.average is not None:
            tensors["average"] = self.average.state()
        return optimizer, tensors
