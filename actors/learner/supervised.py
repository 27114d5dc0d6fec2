"""The gradient of one supervised step. Not responsible for the loss (the policies), or for the optimizer (``pipeline.sft``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from actors.learner.sharding import sync_gradients
from actors.policy.protocol import Trainable, scale_gradients


def accumulate(
    policy: Trainable,
    nets: Iterable[nn.Module],
    batch: Sequence[tuple[Any, ...]],
    micro_batch: int | None,
    parameters: Sequence[nn.Parameter],
    world: int,
) -> float:
    """Put the gradient of the optimizer step's mean loss into ``parameters``, and return that loss.

    The mean is over all tokens (VLM) or clips (VDM) of the batches of all ``world`` ranks. So it depends neither on how
    ``batch``, this rank's, is cut into micro-batches of ``micro_batch`` samples (None: one), nor on how the samples are
    dealt to ranks. ``nets`` are sharded by ``fully_shard``. Collective.
    """
    size = micro_batch or len(batch)
    total, count = 0.0, 0
    for start in range(0, len(batch), size):
        for net in nets:
            sync_gradients(net, start + size >= len(batch))
        loss = policy.sft_loss(batch[start : start + size])
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + loss.count
    sums = torch.tensor([total, count], dtype=torch.float64, device=parameters[0].device)
    dist.all_reduce(sums)
    total, count = sums.tolist()
    scale_gradients(parameters, world / count)
    return total / count
