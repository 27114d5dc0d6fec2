"""Weights from the learner to the workers through Ray's object store: two functions, ``send`` and ``receive``.

Arrays arrive read-only and without a copy (they lie in shared memory): copy them into parameters, never write to
them. A faster transport for full weights on GPUs belongs behind the same two functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import Tensor

from actors.records import Weights
from cluster.errors import WorkerTimeoutError


def pack(
    version: int,
    kind: Literal["lora", "full"],
    tensors: Mapping[str, Tensor],
    adapter_config: Mapping[str, Any] | None = None,
) -> Weights:
    """Return ``tensors`` (any device, float) as a :class:`Weights` record; bf16 travels as uint16, other dtypes as
    they are.
    """
    arrays: dict[str, np.ndarray] = {}
    bf16: set[str] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            bf16.add(name)
            value = value.view(torch.uint16)
        arrays[name] = value.numpy()
    return Weights(version, kind, arrays, dict(adapter_config or {}), frozenset(bf16))


def as_tensors(weights: Weights) -> dict[str, Tensor]:
    """Return the record's arrays as CPU tensors that own their memory, bf16 restored."""
    tensors = {}
    for name, array in weights.tensors.items():
        tensor = torch.from_numpy(np.array(array))
        tensors[name] = tensor.view(torch.bfloat16) if name in weights.bf16 else tensor
    return tensors


def send(weights: Weights) -> list[ray.ObjectRef]:
    """Put ``weights`` into the object store once; the list goes to any number of receivers.

    A list, because Ray resolves a bare reference among a call's arguments before the worker runs, and a worker should
    itself decide when to fetch. The caller must keep the list alive until every receiver is done.
    """
    return [ray.put(weights)]


def receive(refs: Sequence[ray.ObjectRef], timeout_s: float = 60.0) -> Weights:
    """Return the weights behind ``refs`` (what :func:`send` or a learner's ``publish`` gave), arrays read-only.

    Raises:
        WorkerTimeoutError: they did not arrive within ``timeout_s`` seconds.
    """
    try:
        (weights,) = ray.get(list(refs), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerTimeoutError(
            f"published weights did not arrive within {timeout_s:.0f} s; is the learner's node alive, and is this "
            "node's object store large enough?"
        ) from error
    return weights
