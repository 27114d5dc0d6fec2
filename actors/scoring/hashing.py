"""A hash of frozen modules, by which a stage proves that they stayed as they were."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def modules_hash(*modules: nn.Module) -> str:
    """Return a hash of all parameters and buffers, equal for equal weights."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            # A copy: a storage that numpy has seen can no longer be freed, and a worker that rests frees it.
            copied = tensor.detach().cpu().contiguous().reshape(-1).clone()
            digest.update(copied.view(torch.uint8).numpy().data)
    return digest.hexdigest()
