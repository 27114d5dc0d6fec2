"""LoRA on a CPU by whole matrix products: vLLM's own operators gather an adapter for every token, which is slow.

Responsible for one class, which the engine puts in the place of vLLM's (``pools.vlm.grouped_lora``). Not responsible for adapters,
their slots, or which request uses which: vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Groups = list[tuple[int, Tensor | None]]
"""Slots, and which rows of a batch use them (None: all)."""


class GroupedLora(PunicaWrapperCPU):
    """Adds ``x @ A.T @ B.T`` for all tokens of an adapter at once; tokens without one stay as they are.

    vLLM 0.32 marks such a token with slot -1 and, where others of its batch have an adapter, gives it that of the last slot.
    """

    tokens: Groups | None = None  # of the batch that is coming
    sampled: Groups | None = None  # of its rows of logits

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's; groups the batch's tokens by adapter."""
        super().update_metadata(*args, **kwargs)
        self.tokens, self.sampled = _groups(self.token_lora_indices), _groups(self.sampler_indices)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to y (tokens, out), in place; x (tokens, in), and per slice A (slots, 1, rank, in) and B (slots, 1, part, rank)."""
        if self.tokens is None or buffer is not None or len(x) != len(self.token_lora_indices):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
            return
        start = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add(y[:, start : start + size], x, a, b, scale, self.tokens)
            start += size

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the logits y (rows, at least vocabulary), in place; A and B as above, part being the vocabulary."""
        if self.sampled is None or buffer is not None or len(x) != len(self.sampler_indices):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
            return
        _add(y[:, : lora_b_stacked.shape[-2]], x, lora_a_stacked, lora_b_stacked, scale, self.sampled)


def _groups(indices: Tensor) -> Groups:
    slots = indices.unique().tolist()
    return [(slot, None if len(slots) == 1 else (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, groups: Groups) -> None:
    for slot, rows in groups:
        tokens = x if rows is None else x[rows]
        # The inner product is float32, as vLLM's.
        inner = (tokens.float() @ a[slot].flatten(0, -2).float().T).mul_(scale).to(y.dtype)
        delta = inner @ b[slot].flatten(0, -2).to(y.dtype).T
        if rows is None:
            y += delta
        else:
            y.index_add_(0, rows, delta)


def group_lora(model_runner: Any) -> int:
    """Let the adapters of ``model_runner`` be added by :class:`GroupedLora`; returns how many of vLLM's objects that changed."""
    manager = getattr(model_runner, "lora_manager", None)
    if manager is None or torch.cuda.is_available():
        return 0
    found = [w for w in manager._adapter_manager.punica_wrapper_mapping.values() if type(w) is PunicaWrapperCPU]
    for wrapper in found:
        wrapper.__class__ = GroupedLora  # every LoRA layer holds this very object
    return len(found)
