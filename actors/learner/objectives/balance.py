"""How the denoising steps of a flow are made to learn alike. Pure torch.

A step's log-density is that of N(mean, std^2), averaged over all latent values. Its gradient in the velocity is proportional to
(d mean / d v) / std, and so is the spread of its ratio: both differ between steps by where these stand, and one clip range fits
few of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actors.learner.objectives.settings import StepBalance
from actors.policy.protocol import PolicyOutput


def balanced(how: StepBalance, out: PolicyOutput, old: PolicyOutput, batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return (log-ratio, weight of the surrogate) of each step, (B, T); None is the plain log-ratio, or weight 1.

    ``rectify``: the weight is ``batch.rectified`` (``flow_sde.rectification``; Flash-GRPO, arXiv 2605.15980).

    ``ratio_norm``: the log-ratio is :func:`normalised_log_ratio`, the weight 1 / dsigma with dsigma = ``batch.spans``
    (GRPO-Guard, arXiv 2510.22319, whose code is flow_grpo's ``train_sd3_GRPO_Guard.py``). Before the first update the surrogate's
    gradient in v is then, up to the advantage and the noise, |d mean / d v| / dsigma = 1 + s^2 (1 - sigma) / (2 sigma): the
    constant 1 + a^2 / 2 of schedule ``flow`` (1 at sigma = 1), and near 1 of ``dance`` and ``wan``. ``cps`` has no s(sigma), and
    its derivative is not proportional to dsigma.
    """
    if how == "rectify":
        return None, batch.rectified
    if how == "ratio_norm":
        return normalised_log_ratio(out, old), 1.0 / batch.spans
    return None, None


def normalised_log_ratio(out: PolicyOutput, old: PolicyOutput) -> Tensor:
    """Return (log p − log p_old + ||d||^2 / (2 std^2)) · std of each step, (B, T), differentiable, with d = mean − mean_old.

    ||·||^2 is the mean over the latent values, as the log-densities are. With the noise eps = (x' − mean_old) / std,

        log p − log p_old = mean(eps d) / std − ||d||^2 / (2 std^2).

    The second term is never positive: it draws ratios below 1, and the more so the smaller std is. Without it, and times std, the
    log-ratio is mean(eps d), which is symmetric about 0 and has no std in it.
    """
    assert out.mean is not None and old.mean is not None and out.std is not None
    squared = (out.mean - old.mean).square().flatten(2).mean(dim=2)
    std = torch.where(out.mask, out.std, 1.0)
    return (out.logprobs - old.logprobs + squared / (2 * std.square())) * std
