"""The artist's adapter on disk: PEFT's folder, and the file of the same weights that diffusers' ``load_lora_weights``
reads; and switching it off.

Where the adapter sits in WanTransformer3DModel is decided here; injecting it and naming its tensors is
``actors.learner.lora``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import WanPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.learner.trainable import LoraSpec
from cluster.errors import CheckpointError

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def spec_of(config: Mapping[str, Any]) -> LoraSpec:
    """Return the LoraSpec of a PEFT configuration; CheckpointError where it is not plain LoRA on named modules."""
    if str(config.get("peft_type", "LORA")) != "LORA" or config.get("use_dora") or config.get("use_rslora"):
        raise CheckpointError(
            "the adapter is not plain LoRA (peft_type LORA without DoRA or rsLoRA), the only kind supported"
        )
    targets = config.get("target_modules")
    if not isinstance(targets, (list, tuple, set)) or not targets:
        raise CheckpointError(f"the adapter's target_modules={targets!r} must be a list of module name endings")
    return LoraSpec(rank=int(config["r"]), alpha=float(config["lora_alpha"]), targets=tuple(sorted(targets)))


def same_shape(one: LoraSpec, other: LoraSpec) -> bool:
    """Return whether two adapters have the same rank, alpha and targets."""
    targets = [set(spec.targets or DEFAULT_TARGETS) for spec in (one, other)]
    return (one.rank, one.alpha) == (other.rank, other.alpha) and targets[0] == targets[1]


def read_adapter(folder: str | Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Read a PEFT adapter folder: its shape, and its tensors under PEFT names."""
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a PEFT adapter folder: {name} is missing")
    try:
        return spec_of(json.loads((folder / CONFIG).read_text(encoding="utf-8"))), load_file(folder / TENSORS)
    except (json.JSONDecodeError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder} holds a damaged adapter: {type(error).__name__}: {error}") from error


def write_adapter(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write PEFT-named ``tensors`` as a PEFT adapter folder plus ``pytorch_lora_weights`` for diffusers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / TENSORS, metadata={"format": "pt"})
    bare = {name.removeprefix(_PREFIX): tensor for name, tensor in plain.items()}
    shape = {name: config[name] for name in ("r", "lora_alpha", "target_modules")}
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=bare, transformer_lora_adapter_metadata=shape)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
