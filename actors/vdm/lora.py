"""The artist's adapter on disk: PEFT's folder, and the file of the same weights that diffusers' ``load_lora_weights``
reads; and switching it off.

Where the adapter sits in WanTransformer3DModel is decided here; injecting it and naming its tensors is
``actors.policy.lora``'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import WanPipeline
from torch import Tensor

from actors.learner.peft_folder import write_folder
from actors.policy.settings import LoraSection

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
_PREFIX = "base_model.model."


def same_shape(one: LoraSection, other: LoraSection) -> bool:
    """Return whether two adapters, whose targets are modules' full names, have the same rank, alpha and modules."""
    return (one.rank, one.alpha, set(one.targets or ())) == (other.rank, other.alpha, set(other.targets or ()))


def resolved(spec: LoraSection, layers: Collection[str]) -> LoraSection:
    """Return ``spec`` with the full names of the layers that its targets (by default ``DEFAULT_TARGETS``) name."""
    targets = spec.targets or DEFAULT_TARGETS
    found = sorted(n for n in layers if any(n == t or n.endswith(f".{t}") for t in targets))
    return spec.model_copy(update={"targets": found})


def write_adapter(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write PEFT-named ``tensors`` as a PEFT adapter folder plus ``pytorch_lora_weights`` for diffusers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    bare = {name.removeprefix(_PREFIX): tensor for name, tensor in plain.items()}
    shape = {name: config[name] for name in ("r", "lora_alpha", "target_modules")}
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=bare, transformer_lora_adapter_metadata=shape)
    write_folder(folder, config, plain)
