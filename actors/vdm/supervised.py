"""The artist's supervised loss: flow matching on the target's latents, at levels and with weights as a run sets them.

Responsible for drawing levels, noise and dropped captions clip by clip. The mathematics is ``flow_sde``'s, velocities are the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from actors.policy.protocol import SupervisedLoss
from actors.vdm import flow_sde
from actors.vdm.flow_sde import FlowMatchingSpec

if TYPE_CHECKING:
    from actors.vdm.policy import VdmPolicy


def flow_matching_loss(
    policy: VdmPolicy,
    batch: Sequence[tuple[np.ndarray, str, np.ndarray]],
    generator: torch.Generator | None,
    spec: FlowMatchingSpec,
) -> SupervisedLoss:
    """Return the flow-matching loss mean((v - (eps - x0))^2) over each clip's target latents, weighted and summed over the clips.

    batch: (reference frames uint8 (n, H, W, 3), caption, target frames uint8 (T, H, W, 3)), equal sizes.
    ``generator`` (CPU) draws sigma, noise and dropped captions, clip by clip: they are the same however a batch is
    cut. None is torch's global one.
    """
    references = [reference for reference, _, _ in batch]
    clean = policy.encode_targets([target for _, _, target in batch], references)
    draws = [
        (
            float(torch.rand((), generator=generator)) < spec.caption_dropout,
            flow_sde.sample_sigmas(1, spec, policy.shift, generator),
            torch.randn(clean.shape[1:], generator=generator),
        )
        for _ in batch
    ]
    dropped = [drop for drop, _, _ in draws]
    captions = [policy.negative_prompt if drop else caption for (_, caption, _), drop in zip(batch, dropped)]
    sigma = torch.cat([sigma for _, sigma, _ in draws]).to(policy.device)
    noise = torch.stack([noise for _, _, noise in draws]).to(policy.device)
    noisy, target = flow_sde.noisy_pair(clean, noise, sigma)
    condition = policy.condition(captions, references, [1.0] * len(batch), len(batch[0][2]))
    per_clip = ((policy.velocity(noisy, sigma, condition) - target) ** 2).flatten(1).mean(dim=1)
    if spec.weighting == "bell":
        per_clip = per_clip * flow_sde.bell_weights(sigma, policy.shift)
    metrics = {
        "loss": float(per_clip.detach().mean()),
        "sigma_mean": float(sigma.mean()),
        "caption_dropped": float(np.mean(dropped)),
    }
    return SupervisedLoss(per_clip.sum(), len(batch), metrics)
