"""Weights from the learner to the workers: what is published, and how a worker gets it.

A payload is a list. Its first entry is a reference to the weights in Ray's object store, from which any worker can have them
at any time (:func:`receive`). A second entry, where there is one, offers the same version by broadcast to those who come soon
(``actors.weights.broadcast``); :func:`fetch` takes what it can get.

Arrays from the object store arrive read-only and without a copy (they lie in shared memory): copy them into parameters, never
write to them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import Tensor

from actors.records import Weights
from actors.weights.broadcast import BroadcastError, Offer, receive_broadcast
from cluster.errors import WorkerTimeoutError

log = logging.getLogger(__name__)

Arrival = Literal["object store", "broadcast"]
"""How weights have reached a worker."""


@dataclass(frozen=True, eq=False)
class Delivery:
    """One version as a worker loads it: tensors to be copied into parameters and let go, and how they have arrived."""

    kind: Literal["lora", "full"]
    tensors: dict[str, Tensor]
    adapter_config: dict[str, Any] = field(default_factory=dict)
    arrival: Arrival = "object store"


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


def as_tensors(weights: Weights, *, copy: bool = True) -> dict[str, Tensor]:
    """Return the record's arrays as CPU tensors, bf16 restored, that own their memory; without ``copy`` they are views of the
    arrays, for those who only read them.
    """
    tensors = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        for name, array in weights.tensors.items():
            tensor = torch.from_numpy(np.array(array) if copy else array)
            tensors[name] = tensor.view(torch.bfloat16) if name in weights.bf16 else tensor
    return tensors


def send(weights: Weights) -> list[ray.ObjectRef]:
    """Put ``weights`` into the object store once; the list goes to any number of receivers.

    A list, because Ray resolves a bare reference among a call's arguments before the worker runs, and a worker should
    itself decide when to fetch. The caller must keep the list alive until every receiver is done.
    """
    return [ray.put(weights)]


def receive(payload: Sequence[Any], timeout_s: float = 60.0) -> Weights:
    """Return the weights of ``payload`` (what :func:`send` or a learner's ``publish`` gave) from the object store.

    Arrays are read-only.

    Raises:
        WorkerTimeoutError: they did not arrive within ``timeout_s`` seconds.
    """
    try:
        weights: Weights = ray.get(payload[0], timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerTimeoutError(
            f"published weights did not arrive within {timeout_s:.0f} s; is the learner's node alive, and is this "
            "node's object store large enough?"
        ) from error
    return weights


def offer_of(payload: Sequence[Any]) -> Offer | None:
    """Return where ``payload`` can be received by broadcast, or None."""
    return payload[1] if len(payload) > 1 else None


def fetch(payload: Sequence[Any], device: str | torch.device = "cpu", timeout_s: float = 60.0) -> Delivery:
    """Return ``payload``'s weights: by broadcast onto ``device``, or else from the object store, as views of its memory.

    Views are read-only: whoever keeps a tensor, or writes to one, copies it first.

    Raises:
        WorkerTimeoutError: see :func:`receive`.
    """
    offer = offer_of(payload)
    if offer is not None:
        try:
            batches = receive_broadcast(offer, torch.device(device))
            return Delivery("full", {name: t for batch in batches for name, t in batch}, arrival="broadcast")
        except BroadcastError as error:
            log.warning("weights version %d are taken from the object store: %s", offer.version, error)
    weights = receive(payload, timeout_s)
    return Delivery(weights.kind, as_tensors(weights, copy=False), weights.adapter_config)
