"""LoRA on any module: seeded injection, the adapter's names as PEFT writes them, and switching it off for the
reference.

Responsible for what both policies and the learner need of ``peft``. Not responsible for files (``actors.weights``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from actors.policy.settings import LoraSection
from actors.records import derive_seed
from cluster.errors import CheckpointError

ADAPTER = "default"
_PREFIX = "base_model.model."


def inject_lora(module: nn.Module, spec: LoraSection, default_targets: Iterable[str], seed: int = 0) -> nn.Module:
    """Put a LoRA into ``module`` in place and freeze the rest; returns ``module``.

    ``lora_B`` is zero, so the policy does not change; each ``lora_A`` is drawn from (``seed``, its own name): equal on
    every rank, and independent of the order or number of modules.

    Raises:
        ValueError: rank < 1, or no module has a name that ends in one of the targets.
    """
    if spec.rank < 1:
        raise ValueError(f"LoRA rank={spec.rank} must be at least 1; train full weights by leaving LoRA out")
    targets = sorted(spec.targets if spec.targets is not None else default_targets)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(derive_seed("lora", seed, name))
            bound = 1.0 / parameter.shape[1] ** 0.5  # Kaiming uniform with a = sqrt(5), PEFT's own choice
            values = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                parameter.copy_(values)
    return module


def resolved(spec: LoraSection, layers: Collection[str], default_targets: Iterable[str]) -> LoraSection:
    """Return ``spec`` with the full names of the layers that its targets, or else ``default_targets``, name."""
    targets = spec.targets or tuple(default_targets)
    found = sorted(n for n in layers if any(n == t or n.endswith(f".{t}") for t in targets))
    return spec.model_copy(update={"targets": found})


def same_shape(one: LoraSection, other: LoraSection) -> bool:
    """Return whether two adapters, whose targets are modules' full names, have the same rank, alpha and modules."""
    return (one.rank, one.alpha, set(one.targets or ())) == (other.rank, other.alpha, set(other.targets or ()))


def has_lora(module: nn.Module) -> bool:
    """Return whether ``module`` carries an adapter."""
    return any(isinstance(m, BaseTunerLayer) for m in module.modules())


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Run the block with the adapter off: the base model, bit for bit. ValueError where there is no adapter.

    PEFT's ``enable_adapters(False)`` also clears ``requires_grad``. Were that the first forward of a sharded module,
    FSDP2 would take all of its parameters for frozen and fail (bf16) at the first backward; so only the flag is set.
    """
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError("the module carries no LoRA adapter, so there is no reference policy inside it")
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_config(module: nn.Module, base_model: str = "") -> dict[str, Any]:
    """Return the adapter's configuration as PEFT writes it to ``adapter_config.json``. ValueError without an
    adapter.
    """
    configs = getattr(module, "peft_config", None)
    if not configs:
        raise ValueError("the module carries no LoRA adapter, so it has no adapter configuration")
    values = {k: (sorted(v) if isinstance(v, set) else v) for k, v in configs[ADAPTER].to_dict().items()}
    values["peft_type"] = str(getattr(values["peft_type"], "value", values["peft_type"]))
    values["base_model_name_or_path"] = base_model
    values["inference_mode"] = True
    return values


def peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter tensors of a state dict under PEFT's file names (``base_model.model.….lora_A.weight``)."""
    return {
        _PREFIX + name.removeprefix(_PREFIX).replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in state.items()
        if ".lora_A." in name or ".lora_B." in name
    }


def module_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return PEFT-named adapter tensors under the names they have inside an injected module; undoes ``peft_names``."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, weight = name.removeprefix(_PREFIX).rpartition(".")
        renamed[f"{stem}.{ADAPTER}.{weight}"] = tensor
    return renamed


def load_adapter_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy PEFT-named tensors into ``module``'s injected adapter; CheckpointError names what is missing, extra
    or misshapen.
    """
    own = {name: p for name, p in module.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    given = module_names(tensors)
    if own.keys() != given.keys():
        missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise CheckpointError(
            f"the adapter does not fit: {len(missing)} tensors missing {missing[:3]}, {len(extra)} extra {extra[:3]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != given[name].shape:
                raise CheckpointError(
                    f"adapter tensor {name} has shape {tuple(given[name].shape)}, the model needs "
                    f"{tuple(parameter.shape)}; is its rank another?"
                )
            parameter.copy_(given[name])
