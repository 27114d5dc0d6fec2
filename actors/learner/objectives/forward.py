"""What the forward-process objectives share: clips noised anew, the velocities of three sets of weights, and the velocity gate.

A rollout is a plain ODE of any number of steps, and nothing of its path is needed but where it ends. In every optimizer step
each clip gets a new noise level and new noise; the learner's velocity there is judged beside that of the weights that sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.learner.objectives.base import Models, Part, Prepared, Step
from actors.learner.objectives.settings import ForwardSection
from actors.policy.protocol import PolicyOutput
from actors.records import derive_seed

GATE = {"float32": 1e-3}
"""Largest relative deviation of two velocities that is believed, by compute dtype; float noise is below 1e-5 of float32."""
GATE_OTHERWISE = 0.1


class ForwardProcess:
    """A loss on velocities at noised clips. Subclasses say what :meth:`losses` are."""

    keeps_behaviour = True
    behaviour_decay = 0.0
    gate_name = (
        "velocity gate: before any update the learner's velocity and that of the pool's worker differ by a share that"
    )
    gate_metric = "velocity_dev"

    def __init__(self, settings: ForwardSection, longest: int = 0) -> None:
        """``longest`` is for objectives over steps, and not read."""
        self.settings = settings

    def gate_tolerance(self, dtype: str) -> float | None:
        """A thousandth in float32, a tenth in bfloat16."""
        return GATE.get(dtype, GATE_OTHERWISE)

    def before(
        self,
        models: Models,
        steps: Sequence[Sequence[Prepared]],
        gate: bool,
        note: Callable[[Prepared, PolicyOutput], None],
    ) -> None:
        """Make nothing: there are no log-probabilities."""

    def losses(
        self, velocity: Tensor, old: Tensor, reference: Tensor | None, noised: Any, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each clip (B,), differentiable in ``velocity``, and figures of each clip (B,), detached.

        velocity, old, reference: (B, C, F, h, w) float32 of the learner, of the weights that sampled, and of the reference
        (None without a distance to it), at ``noised`` (``actors.vdm.trajectories.Noised``). advantages: (B,).
        """
        raise NotImplementedError

    def part(self, models: Models, item: Prepared, piece: tuple[slice, Any, Tensor | None], step: Step) -> Part:
        """Noise the clips anew and return their summed loss. Padding weighs 0."""
        batch, policy, real = piece[1], models.policy, float(item.micro.real)
        seeds = [derive_seed("forward process", step.seed, step.number, e.sample_id, e.index) for e in item.micro.items]
        noised = policy.noised(batch, seeds)  # type: ignore[attr-defined]
        deviation, velocity = 0.0, policy.velocity  # type: ignore[attr-defined]
        reference = None
        with torch.no_grad():
            with models.behaviour():  # before the pass with gradient, whose saved weights it would change
                old = velocity(noised.noisy, noised.sigma, noised.condition)
                if step.first and step.gate:
                    deviation = self._deviation(velocity, batch)
            if self.settings.kl_beta > 0:
                with models.reference():
                    reference = velocity(noised.noisy, noised.sigma, noised.condition)
        learnt = velocity(noised.noisy, noised.sigma, noised.condition)
        losses, figures = self.losses(learnt, old, reference, noised, item.advantages)
        figures["velocity_gap"] = square(learnt.detach() - old)
        if reference is not None:
            distance = square(learnt - reference)
            losses = losses + self.settings.kl_beta * distance
            figures["kl"] = distance.detach()
        sums = {name: real * float(value.sum()) for name, value in figures.items()}
        return Part(losses.sum() * real, {"steps": real * len(losses), **sums}, deviation * real)

    def count(self, item: Prepared, outputs: Sequence[PolicyOutput]) -> float:
        """Return how many clips the micro-batch has."""
        return float(len(item.micro.items)) if item.micro.real else 0.0

    @staticmethod
    def _deviation(velocity: Callable[..., Tensor], batch: Any) -> float:
        """Return max over clips of ||v - v_worker|| / ||v_worker|| at the rollout's last step, guided as it was there."""
        before, after, (sigma, following) = batch.before[-1], batch.after[-1], batch.sigmas[-1]
        span = (following - sigma).view(-1, *[1] * (before.dim() - 1))
        worker = (after - before) / span
        difference = velocity(before, sigma, batch.condition) - worker
        return float((difference.flatten(1).norm(dim=1) / worker.flatten(1).norm(dim=1).clamp(min=1e-12)).max())


def square(x: Tensor) -> Tensor:
    """Return the mean square of each row, (B,)."""
    return x.square().flatten(1).mean(dim=1)
