"""GPUs on paper: how many, how large, and how fast. Pure; no model is known here.

Peak rates are those of the makers' data sheets (dense, without sparsity). What a model achieves of them is an assumption, which
whoever plans prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import ConfigError

GIB = 1 << 30
MOST_GPUS = 128


@dataclass(frozen=True)
class Card:
    """One GPU's peaks: FLOP/s in bfloat16, TF32 and float32, ``bandwidth`` of its memory in bytes/s."""

    name: str
    gib: int
    bf16: float
    tf32: float
    float32: float
    bandwidth: float


CARDS = {
    card.name: card
    for card in (
        # NVIDIA data sheets: A100 40GB and 80GB (SXM), H100 (SXM), H200 (SXM), L40S.
        Card("a100-40", 40, 312e12, 156e12, 19.5e12, 1.555e12),
        Card("a100", 80, 312e12, 156e12, 19.5e12, 2.039e12),
        Card("h100", 80, 989e12, 494e12, 67e12, 3.35e12),
        Card("h200", 141, 989e12, 494e12, 67e12, 4.8e12),
        Card("l40s", 48, 362e12, 183e12, 91.6e12, 0.864e12),
    )
}
_BY_ACCELERATOR = {"A100": "a100", "H100": "h100", "H200": "h200", "L40S": "l40s"}
"""Ray's name of a GPU's type → card. Ray does not tell forms of one type apart: an H100 is taken for the fastest, SXM."""
_BY_GIB = {40: "a100-40", 48: "l40s", 80: "h100", 141: "h200"}


def peak_flops(accelerator: str, dtype: str) -> float | None:
    """Return the peak FLOP/s in ``dtype`` of the GPU that Ray calls ``accelerator``; None where the card is not known."""
    name = _BY_ACCELERATOR.get(accelerator)
    if name is None:
        return None
    return CARDS[name].float32 if dtype == "float32" else CARDS[name].bf16


@dataclass(frozen=True)
class Rates:
    """What one GPU is assumed to achieve: FLOP/s in bfloat16, TF32 and float32, bytes/s from its memory.

    PyTorch's default computes float32 convolutions in TF32, and float32 matrix products in float32.
    """

    bf16: float
    tf32: float
    float32: float
    bandwidth: float
    source: str
    """For people: where the figures come from."""

    def flops(self, dtype: str) -> float:
        """Return the achieved FLOP/s of computing in ``dtype``."""
        return self.float32 if dtype == "float32" else self.bf16


@dataclass(frozen=True)
class Hardware:
    """``nodes`` machines with ``per_node`` GPUs of ``gib`` GiB each."""

    nodes: int
    per_node: int
    gib: float

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        each = f"{self.per_node} GPU(s) of {self.gib:g} GiB"
        return each if self.nodes == 1 else f"{self.nodes} nodes with {each} each"


def parse_gpus(text: str) -> Hardware:
    """Return the hardware of ``8x80`` (GPUs x GiB) or ``2x8x80`` (nodes x GPUs x GiB). ConfigError for anything else."""
    found = re.fullmatch(r"(?:(\d+)[x×])?(\d+)[x×](\d+(?:\.\d+)?)", text.strip().lower())
    if found is None:
        raise ConfigError(f"--gpus {text!r}: write GPUs x GiB, such as 8x80, or nodes x GPUs x GiB, such as 2x8x80")
    hardware = Hardware(int(found[1] or 1), int(found[2]), float(found[3]))
    if not 0 < hardware.gpus <= MOST_GPUS or hardware.gib <= 0:
        raise ConfigError(f"--gpus {text!r}: 1 to {MOST_GPUS} GPUs in all, of more than 0 GiB")
    return hardware


def rates_of(
    hardware: Hardware, card: str | None = None, *, mfu: float = 0.4, mbu: float = 0.6, tflops: float | None = None
) -> Rates:
    """Return what a GPU is assumed to achieve: ``mfu`` of the peak FLOP/s and ``mbu`` of the peak bandwidth of ``card``.

    ``card`` is one of CARDS; None takes the one that is sold with that much memory (an A100 where none is known).
    ``tflops``: measured bfloat16 TFLOP/s, in place of the assumed. ConfigError for an unknown card.
    """
    name = card or _BY_GIB.get(round(hardware.gib), "a100")
    if name not in CARDS:
        raise ConfigError(f"--card {name!r} is not known; use one of {', '.join(CARDS)}, or give --tflops")
    known = CARDS[name]
    bf16 = mfu * known.bf16 if tflops is None else tflops * 1e12
    share = bf16 / known.bf16
    what = (
        f"{name.upper()}: {share:.0%} of its peaks"
        if tflops is None
        else f"{tflops:g} TFLOP/s as stated, of an {name.upper()}"
    )
    return Rates(
        bf16,
        share * known.tf32,
        share * known.float32,
        mbu * known.bandwidth,
        f"{what} ({_tera(bf16)} TFLOP/s in bfloat16, {_tera(share * known.tf32)} in TF32, "
        f"{_tera(share * known.float32)} in float32), {mbu:.0%} of its memory's bandwidth ({_tera(mbu * known.bandwidth)} TB/s)",
    )


def _tera(value: float) -> str:
    return f"{value / 1e12:.3g}"
