"""GRPO on given log-probabilities. Pure torch: no model, no Ray, no optimizer.

Losses are sums divided by a ``normaliser`` that the caller counts over **all** ranks and micro-batches, so that the
sum of the micro-batch losses is the loss of the whole batch, however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from actors.learner.objectives.balance import balanced
from actors.learner.objectives.base import LossStats, Models, Part, Prepared, Step
from actors.learner.objectives.settings import FlowGrpoSection, GrpoSection, StepBalance, TokenGrpoSection
from actors.policy.protocol import PolicyOutput

LOSS_NORMS = ("token", "sequence", "constant")
TOKEN_ESTIMATORS = ("k1", "k2", "k3")
CORRECTIONS = ("token_tis", "sequence_tis", "sequence_mask")

LOG_RATIO_BOUND = 20.0
"""Nats. Every exp of a difference of log-probabilities takes it cut to −20 … 20: a ratio of 2·10⁻⁹ … 5·10⁸.

float32's exp is infinite from 88.8 on, and 0 · infinity is no number: one such step would void the whole batch. The bound is
verl's (``core_algos.py``: policy loss and ``kl_penalty``). verl also cuts each k3 at 10; here it is not, because a cut
value has no gradient, and k3 passes 10 from Δ = 2.6 on, where the KL still has to pull the policy back.
"""


def bounded(log_ratio: Tensor) -> Tensor:
    """Return ``log_ratio`` cut to ±``LOG_RATIO_BOUND``, for exp. What is cut has no gradient; the rest is untouched."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(current || reference) per step, >= 0: exp(Δ) − Δ − 1 with Δ = ref − current.

    Shapes as the arguments (B, T). Schulman 2020, "Approximating KL divergence"; used by GRPO (arXiv 2402.03300, eq.
    4). Above ``LOG_RATIO_BOUND`` it stays at its value there, without a gradient. Below −``LOG_RATIO_BOUND`` exp(Δ) is 0
    for all purposes, and −Δ − 1 still pulls the policy back.
    """
    delta = ref_logprobs - logprobs
    return torch.expm1(bounded(delta)) - delta.clamp(max=LOG_RATIO_BOUND)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Return the estimate of KL(current || reference) per step from samples of the current policy, with its gradient.

    With Δ = ref − current (Schulman 2020, "Approximating KL divergence") the values are

    - ``k1`` −Δ: unbiased, of either sign, large variance;
    - ``k2`` Δ²/2: biased, >= 0, small variance;
    - ``k3`` exp(Δ) − Δ − 1: unbiased, >= 0, small variance (GRPO, arXiv 2402.03300, eq. 4). It alone takes an exp, and is
      bounded (see :func:`k3`).

    A good value isn't a good loss (arXiv 2510.01555). In expectation over samples of the current policy the gradient of
    ``k2`` is that of KL(current || reference); that of ``k3`` is the gradient of KL(reference || current), equal to
    first order; that of a bare ``k1`` is 0, noise that regularises nothing. So ``k1`` here has the value of k1 and the
    gradient of k2, which is what "k1 in the reward" comes to. The samples are those of the rollout: once the policy
    has moved away from it (several updates per batch) no estimator is corrected for that.

    Shapes as the arguments (B, T). ValueError for an unknown estimator.
    """
    delta = ref_logprobs - logprobs
    if estimator == "k1":
        half_square = 0.5 * delta.square()
        return half_square + (-delta - half_square).detach()
    if estimator == "k2":
        return 0.5 * delta.square()
    if estimator == "k3":
        return k3(logprobs, ref_logprobs)
    raise ValueError(f"kl_estimator={estimator!r} is unknown for tokens; use one of {', '.join(TOKEN_ESTIMATORS)}")


def normaliser(mask: Tensor, loss_norm: str, constant_length: int = 0) -> float:
    """Return what this batch adds to the global normaliser of ``grpo_loss``.

    ``token`` counts masked steps (DAPO, arXiv 2503.14476, eq. 8), ``sequence`` counts trajectories with any step
    (GRPO), ``constant`` counts trajectories times ``constant_length`` (Dr.GRPO, arXiv 2503.20783).
    """
    sequences = float(mask.any(dim=-1).sum())
    if loss_norm == "token":
        return float(mask.sum())
    if loss_norm == "sequence":
        return sequences
    if loss_norm == "constant":
        if constant_length < 1:
            raise ValueError(
                "loss_norm=constant divides by a constant length: give constant_length >= 1 (e.g. max_tokens)"
            )
        return sequences * constant_length
    raise ValueError(f"loss_norm={loss_norm!r} is unknown; use one of {', '.join(LOSS_NORMS)}")


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float, correction: str = "token_tis"
) -> Tensor:
    """Return the weights of the engine's samples, (B, T), 0..cap, without gradient; 1 where ``mask`` is False.

    With r = π_learner / π_engine: ``token_tis`` is min(r, cap) per step. ``sequence_tis`` is min(R, cap) with R the product
    of a trajectory's r, the same for all of its steps. ``sequence_mask`` is R where it is at most ``cap``, else 0.

    The log-ratio is cut at ±``LOG_RATIO_BOUND``.

    Engine and learner disagree by numerics even where they hold the same weights, and an engine's may be older. Truncated
    importance sampling (Ionides 2008; between engine and learner: Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training") makes the engine's samples count as the learner's.
    """
    log_weight = mismatch(old_logprobs, rollout_logprobs, mask, correction)
    weights = torch.exp(bounded(log_weight))
    weights = torch.where(weights > cap, 0.0, weights) if correction == "sequence_mask" else weights.clamp(max=cap)
    return torch.where(mask, weights, 1.0)


def mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, correction: str) -> Tensor:
    """Return log(π_learner / π_engine) of each step, or of its whole trajectory, (B, T), detached; 0 where masked for tokens."""
    if correction not in CORRECTIONS:
        raise ValueError(f"rollout_correction={correction!r} is unknown; use one of {', '.join(CORRECTIONS)}")
    difference = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).detach()
    return difference if correction == "token_tis" else difference.sum(-1, keepdim=True).expand_as(difference)


Surrogate = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
Level = Literal["token", "sequence"]


def clipped_surrogate(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return −min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A) per step, (B, T) (PPO, arXiv 1707.06347, eq. 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    loss_norm: str,
    normaliser: float,
    kl: Tensor | None = None,
    beta: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float = 2.0,
    lengths: Tensor | None = None,
    kl_log_ratio: Tensor | None = None,
    log_ratio: Tensor | None = None,
    step_weights: Tensor | None = None,
    correction: str = "token_tis",
    level: Level = "token",
    surrogate: Surrogate = clipped_surrogate,
) -> tuple[Tensor, LossStats]:
    """Return the clipped surrogate plus KL, as this micro-batch's share of the batch's loss, and its statistics.

    Per step: −w·min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A) + beta·KL with ρ = exp(logp − logp_old)
    (arXiv 2402.03300, eq. 3; separate bounds as in DAPO, arXiv 2503.14476), and w = 1, or :func:`importance_weights`.
    Each log-ratio is cut at ±``LOG_RATIO_BOUND`` before exp, and counted; a step whose ρ is cut has no gradient but the KL's.

    Args:
        logprobs: (B, T) float32 of the current policy, differentiable.
        old_logprobs: (B, T) float32 of the learner before this batch's first update: ρ is relative to it.
        advantages: (B,) one per trajectory, or (B, T).
        mask: (B, T) bool, True where a step counts.
        clip_low, clip_high: > 0.
        loss_norm: ``token``: sum over steps / normaliser. ``sequence``: sum over trajectories of the mean over their
            steps / normaliser. ``constant``: sum over steps / normaliser.
        normaliser: the global count for this ``loss_norm`` (see :func:`normaliser`), > 0.
        kl: (B, T) differentiable (see :func:`kl_estimate`); needed where ``beta`` > 0.
        beta: weight of the KL.
        rollout_logprobs: (B, T) float32 of the engine that sampled. Where they are given, w corrects the surrogate
            for their difference to ``old_logprobs``; the clip looks at ρ alone, and the KL is not weighted.
        importance_cap: C of the truncation, > 0.
        lengths: (B,) steps that count in each whole trajectory, where T is only a part of them (``sequence`` divides by
            it); None: the mask's own.
        log_ratio: (B, T) differentiable, what stands in the place of logp − logp_old; None: that itself.
        step_weights: (B, T) by which the surrogate of each step is multiplied, and the KL is not; None: 1.
        correction: how ``rollout_logprobs`` weigh (see :func:`importance_weights`).
        level: ``token``: a ratio per step. ``sequence``: one per trajectory, the geometric mean of its steps'.
        surrogate: what a step's ratio and advantage come to, the clipped one by default.
        kl_log_ratio: (B, T) Δ of which ``kl`` took an exp (k3), only to be counted where it was cut; None: of nothing.

    Returns:
        A scalar whose sum over all micro-batches of all ranks is the batch's loss, and :class:`LossStats`.
    """
    if normaliser <= 0:
        raise ValueError(f"normaliser={normaliser} must be positive: the batch has no step that counts")
    if beta > 0 and kl is None:
        raise ValueError(f"beta={beta} needs the KL per step (kl=None)")
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    # Padding may hold anything; where() before exp() keeps it out of the value and of the gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs if log_ratio is None else log_ratio, 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(-1) / mask.sum(-1).clamp(min=1))[:, None].expand_as(log_ratio)
    ratio = torch.exp(bounded(log_ratio))
    per_step = surrogate(torch.where(mask, logprobs, 0.0), ratio, advantages, clip_low, clip_high)
    if step_weights is not None:
        per_step = per_step * step_weights
    truncated, exponents = 0.0, [log_ratio]
    if rollout_logprobs is not None:
        weights = importance_weights(old_logprobs, rollout_logprobs, mask, importance_cap, correction)
        per_step = per_step * weights
        exponents.append(mismatch(old_logprobs, rollout_logprobs, mask, correction))
        truncated = float((mask & (exponents[-1] > math.log(importance_cap))).sum())
    if kl_log_ratio is not None:
        exponents.append(kl_log_ratio)
    if kl is not None and beta > 0:
        per_step = per_step + beta * torch.where(mask, kl, 0.0)
    per_step = torch.where(mask, per_step, 0.0)
    if loss_norm == "sequence":
        total = (per_step.sum(-1) / (mask.sum(-1) if lengths is None else lengths).clamp(min=1)).sum()
    elif loss_norm in LOSS_NORMS:
        total = per_step.sum()
    else:
        raise ValueError(f"loss_norm={loss_norm!r} is unknown; use one of {', '.join(LOSS_NORMS)}")
    cut = mask & torch.stack([x.detach().abs() > LOG_RATIO_BOUND for x in exponents]).any(dim=0)
    counts = truncated, float(cut.sum())
    return total / normaliser, _stats(log_ratio, ratio, advantages, mask, clip_low, clip_high, kl, counts)


@torch.no_grad()
def _stats(
    log_ratio: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    kl: Tensor | None,
    counts: tuple[float, float],
) -> LossStats:
    low = mask & (ratio < 1.0 - clip_low) & (advantages < 0)
    high = mask & (ratio > 1.0 + clip_high) & (advantages > 0)
    return LossStats(
        steps=float(mask.sum()),
        ratio=float(torch.where(mask, ratio, 0.0).sum()),
        clipped=float((low | high).sum()),
        clipped_low=float(low.sum()),
        clipped_high=float(high.sum()),
        truncated=counts[0],
        bounded=counts[1],
        kl=float(torch.where(mask, kl, 0.0).sum()) if kl is not None else 0.0,
        ratio_max_dev=float(log_ratio.abs().max()) if log_ratio.numel() else 0.0,
    )


class Grpo:
    """GRPO: the clipped ratio of each step, times its trajectory's advantage (arXiv 2402.03300)."""

    keeps_behaviour = False
    behaviour_decay = 0.0
    gate_metric = "ratio_max_dev"
    gate_name = "ratio gate: before any update the log-ratio to the old policy"
    level: ClassVar[Level] = "token"
    surrogate = staticmethod(clipped_surrogate)

    def __init__(self, settings: GrpoSection, longest: int = 0) -> None:
        """``longest``: steps of the longest possible trajectory, the divisor of ``loss_norm="constant"``."""
        if settings.loss_norm == "constant" and longest < 1:
            raise ValueError(
                "loss_norm=constant needs the longest possible trajectory, e.g. the longest completion in tokens"
            )
        self.settings, self.longest = settings, longest
        self.balance: StepBalance = settings.step_balance if isinstance(settings, FlowGrpoSection) else "none"

    def _kept(self, out: PolicyOutput) -> PolicyOutput:
        """Return what later updates of the same batch need of ``out``; means are as large as latents."""
        mean = out.mean.detach() if self.balance == "ratio_norm" and out.mean is not None else None
        return PolicyOutput(out.logprobs.detach(), out.mask, mean=mean)

    def gate_tolerance(self, dtype: str) -> float | None:
        """A fifth of the clip range; no gate where the samples count as the engine's."""
        return self.settings.clip_low / 5 if self.settings.old_logprobs == "learner" else None

    def before(
        self,
        models: Models,
        steps: Sequence[Sequence[Prepared]],
        gate: bool,
        note: Callable[[Prepared, PolicyOutput], None],
    ) -> None:
        """Make the old log-probabilities. The first step's are those of its training pass, unless the gate compares the two."""
        for step in steps if gate else steps[1:]:
            for item in step:
                with torch.no_grad():
                    out = models.policy.forward(item.batch)
                item.old = self._kept(out)
                note(item, out)

    def part(self, models: Models, item: Prepared, piece: tuple[slice, Any, Tensor | None], step: Step) -> Part:
        """Return the loss of one piece (see :func:`grpo_loss`), its figures and its log-probabilities."""
        steps, batch, lengths = piece
        out = models.policy.forward(batch)
        mask = out.mask if item.micro.real else torch.zeros_like(out.mask)
        kept = self._kept(out)
        old = kept if item.old is None else item.old.steps(steps)
        kl, kl_log_ratio = self._kl(models, batch, out)
        log_ratio, step_weights = balanced(self.balance, out, old, batch)
        # Divided by the global count after the last micro-batch: only then is it known, and gradients are linear in it.
        loss, stats = self.loss(
            out.logprobs,
            old.logprobs,
            item.advantages,
            mask,
            rollout_logprobs=item.rollout[:, steps],
            log_ratio=log_ratio,
            step_weights=step_weights,
            kl=kl,
            kl_log_ratio=kl_log_ratio,
            lengths=lengths,
        )
        unused = {"ratio_max_dev"}
        unused |= set() if self.settings.kl_beta > 0 else {"kl"}
        unused |= set() if self.settings.old_logprobs == "rollout" else {"truncated"}
        sums = {name: value for name, value in asdict(stats).items() if name not in unused}
        if out.entropy is not None:
            sums["entropy"] = float(torch.where(mask, out.entropy, 0.0).sum())
        return Part(loss, sums, stats.ratio_max_dev, kept)

    def count(self, item: Prepared, outputs: Sequence[PolicyOutput]) -> float:
        """Return the micro-batch's share of the count (see :func:`normaliser`)."""
        mask = torch.cat([out.mask for out in outputs], dim=1)
        return self.normaliser(mask if item.micro.real else torch.zeros_like(mask))

    def _kl(self, models: Models, batch: Any, out: PolicyOutput) -> tuple[Tensor | None, Tensor | None]:
        """Return the KL per step, and the log-ratio of which it takes an exp: k3 alone does, the closed form does not."""
        estimator = self.settings.kl_estimator
        if self.settings.kl_beta <= 0:
            return None, None
        with torch.no_grad(), models.reference():
            ref = models.policy.forward(batch)
        exponent = ref.logprobs - out.logprobs.detach() if out.mean is None and estimator in (None, "k3") else None
        return models.policy.kl(out, ref, estimator), exponent

    def normaliser(self, mask: Tensor) -> float:
        """Return the micro-batch's share of the count (see :func:`normaliser`)."""
        return normaliser(mask, self.settings.loss_norm, self.longest)

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
        log_ratio: Tensor | None = None,
        step_weights: Tensor | None = None,
    ) -> tuple[Tensor, LossStats]:
        """Return the sum over the micro-batch and its statistics (see :func:`grpo_loss`)."""
        settings = self.settings
        return grpo_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            loss_norm=settings.loss_norm,
            normaliser=1.0,
            kl=kl,
            beta=settings.kl_beta,
            rollout_logprobs=rollout_logprobs if settings.old_logprobs == "rollout" else None,
            importance_cap=settings.importance_cap,
            correction=settings.rollout_correction if isinstance(settings, TokenGrpoSection) else "token_tis",
            lengths=lengths,
            kl_log_ratio=kl_log_ratio,
            log_ratio=log_ratio,
            step_weights=step_weights,
            level=self.level,
            surrogate=self.surrogate,
        )
