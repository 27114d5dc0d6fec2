"""The artist's low-rank adapter: where it sits in WanTransformer3DModel, and the names its tensors travel under.

PEFT names (``base_model.model.blocks.0.attn1.to_q.lora_A.weight``) are used between processes and in folders; inside the module the
adapter is injected, so its parameters are called ``blocks.0.attn1.to_q.lora_A.default.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.learner.trainable import LoraSpec
from cluster.errors import CheckpointError

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
_PREFIX = "base_model.model."
_ADAPTER = "default"


def inject(module: nn.Module, spec: LoraSpec) -> LoraConfig:
    """Put a trainable adapter into ``module`` (all else frozen); lora_A is drawn from ``spec.seed``, lora_B is 0."""
    targets = list(spec.targets or DEFAULT_TARGETS)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    return config


def adapter_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of ``module`` that carry an adapter."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def set_enabled(module: nn.Module, enabled: bool) -> None:
    """Switch the adapter on or off without touching ``requires_grad``.

    PEFT's own ``enable_adapters`` freezes the parameters on the way; under FSDP2 and in the middle of a step that is unsafe, hence
    the flag is set directly.
    """
    for layer in adapter_layers(module):
        layer._disable_adapters = not enabled


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Run the block with the adapter off: the base model, bit for bit."""
    set_enabled(module, False)
    try:
        yield
    finally:
        set_enabled(module, True)


def adapter_state(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT names, from ``state`` (a gathered state dict of ``module``) or from ``module``."""
    source = dict(module.state_dict()) if state is None else state
    tensors = {
        _PREFIX + name.replace(f".{_ADAPTER}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in source.items()
        if f".{_ADAPTER}." in name and "lora_" in name
    }
    if not tensors:
        raise ValueError(
            "there is no adapter to read: the policy was loaded without LoRA, or `state` holds no lora_ tensors"
        )
    return tensors


def load_adapter_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy PEFT-named ``tensors`` into the injected adapter; every tensor must have its place and every place its tensor."""
    own = {
        _PREFIX + name.replace(f".{_ADAPTER}.", "."): parameter
        for name, parameter in module.named_parameters()
        if f".{_ADAPTER}." in name and "lora_" in name
    }
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [
        f"{n} {tuple(tensors[n].shape)} for {tuple(own[n].shape)}"
        for n in own.keys() & tensors.keys()
        if tensors[n].shape != own[n].shape
    ]
    if missing or extra or wrong:
        raise CheckpointError(
            f"the adapter does not fit this model's: {len(missing)} tensors missing {missing[:2]}, {len(extra)} unexpected {extra[:2]}, "
            f"{len(wrong)} of another shape {wrong[:2]}; rank and target modules must be equal"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def spec_of(config: Mapping[str, Any]) -> LoraSpec:
    """Return the LoraSpec of a PEFT adapter configuration."""
    if (
        config.get("peft_type", "LORA") not in ("LORA", "PeftType.LORA")
        or config.get("use_dora")
        or config.get("use_rslora")
    ):
        raise CheckpointError(
            f"adapter of type {config.get('peft_type')!r} is not plain LoRA; DoRA and rsLoRA are not supported here"
        )
    targets = config.get("target_modules")
    if isinstance(targets, str):
        raise CheckpointError(
            f"adapter target_modules={targets!r} is a pattern; a list of module name endings is expected"
        )
    return LoraSpec(
        rank=int(config["r"]), alpha=float(config["lora_alpha"]), targets=tuple(sorted(targets)) if targets else None
    )


def read_adapter(folder: str | Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Read a PEFT adapter folder."""
    folder = Path(folder)
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config, tensors):
        if not file.is_file():
            raise CheckpointError(f"{folder} is not a PEFT adapter folder: {file.name} is missing")
    return spec_of(json.loads(config.read_text())), load_file(tensors)


def write_adapter(folder: str | Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a PEFT adapter folder that also holds ``pytorch_lora_weights.safetensors``, which diffusers' ``load_lora_weights`` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    bare = {name.removeprefix(_PREFIX): tensor.clone() for name, tensor in tensors.items()}
    metadata = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules or [])}
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=bare, transformer_lora_adapter_metadata=metadata)
