"""Floating-point operations as pure arithmetic: a kind for each thing that training does with them, and the pieces of a model.

One multiply-add is two operations. Counted are matrix products, convolutions and attention (in full, also where a causal mask
makes half of it zero, as ``torch.utils.flop_counter`` does); norms and activations are not. No torch, so that a plan takes
milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass, by what training does with them.

    ``linear`` are products with weights, ``attention`` those between tokens. Two more kinds of products with weights have no
    backward pass where only an adapter is trained: ``condition`` on inputs that carry no gradient (captions inside the
    blocks), and ``frozen`` before the first adapter (embeddings, the vision tower), which is not recomputed either.
    """

    linear: float = 0.0
    attention: float = 0.0
    condition: float = 0.0
    frozen: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.condition + self.frozen

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear,
            self.attention + other.attention,
            self.condition + other.condition,
            self.frozen + other.frozen,
        )

    def __mul__(self, times: float) -> Flops:
        return Flops(self.linear * times, self.attention * times, self.condition * times, self.frozen * times)

    def backward(self, lora: bool) -> Flops:
        """Return the backward pass of this forward pass: gradients of inputs, and of the weights unless they are frozen.

        The adapter's own products (rank / width of the rest) are left out.
        """
        return Flops(self.linear, self.attention * 2) if lora else self * 2

    def update(self, *, lora: bool, checkpointing: bool, kl: bool, old_pass: bool = True) -> Flops:
        """Return one optimizer pass over what this forward pass reads: forward, backward, and where they apply the passes
        for old log-probabilities, for the reference, and for recomputed activations.
        """
        again = replace(self, frozen=0.0) if lora else self
        return self * (1 + old_pass + kl) + again * checkpointing + self.backward(lora)


def dense(tokens: float, into: int, out: int) -> float:
    """Return the operations of a linear layer on ``tokens`` rows."""
    return 2.0 * tokens * into * out


def conv(cells: float, into: int, out: int, kernel: int) -> Flops:
    """Return the operations of a convolution that writes ``cells`` positions, with ``kernel`` taps each."""
    return Flops(2.0 * cells * into * out * kernel)


def attention(queries: float, keys: float, width: int) -> float:
    """Return the operations between queries and keys of ``width`` in all heads together, and between weights and values."""
    return 4.0 * queries * keys * width


def encoder(config: Mapping[str, Any], tokens: int) -> Flops:
    """Return the operations of one of CLIP's towers on ``tokens`` tokens that are embedded."""
    d = int(config["hidden_size"])
    per_layer = dense(tokens, d, d) * 4 + dense(tokens, d, int(config["intermediate_size"])) * 2
    return Flops(per_layer, attention(tokens, tokens, d)) * int(config["num_hidden_layers"])


def image_tokens(config: Mapping[str, Any]) -> int:
    """Return the tokens that CLIP's vision tower makes of an image: its patches, and one for the whole."""
    return (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1


def image_tower(config: Mapping[str, Any]) -> Flops:
    """Return the operations of CLIP's vision tower on one image, before any projection."""
    pixels, tokens = int(config.get("num_channels", 3)) * int(config["patch_size"]) ** 2, image_tokens(config)
    return Flops(dense(tokens - 1, pixels, int(config["hidden_size"]))) + encoder(config, tokens)
