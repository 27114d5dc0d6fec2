"""LoRA on the VLM's language model: where it is injected, how it is switched off, and PEFT's file names.

Responsible for: the adapter of one model. Not responsible for: gathering sharded weights (``actors.learner``), transport
(``actors.weights``). The vision tower is never adapted: the same module names occur in it, so suffixes alone won't do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.learner.trainable import LoraSpec
from cluster.errors import CheckpointError

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."
_NAME = "default"


class AdapterHandle:
    """The LoRA layers inside ``model`` and their configuration."""

    def __init__(self, model: nn.Module, config: LoraConfig):
        self._config = config
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it every adapted layer computes its base layer alone, bit for bit."""
        # peft's own enable_adapters(False) also clears requires_grad, which sharded parameters must keep.
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, value in zip(self._layers, before, strict=True):
                layer._disable_adapters = value

    def config_dict(self) -> dict[str, Any]:
        """Return the configuration as ``adapter_config.json`` holds it: JSON types only, in inference mode."""
        config = self._config.to_dict()
        config["inference_mode"] = True
        plain = json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
        return dict(sorted(plain.items()))

    def peft_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the adapter out of the model's ``state`` dict and rename it to PEFT's file names; CPU, contiguous."""
        marker = f".{_NAME}."
        return {
            _PREFIX + name.replace(marker, "."): tensor.detach().to("cpu").contiguous()
            for name, tensor in state.items()
            if marker in name and ".lora_" in name
        }

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config_dict(), indent=2) + "\n")
        save_file({k: v.clone() for k, v in tensors.items()}, str(folder / "adapter_model.safetensors"))


def inject(model: nn.Module, lora: LoraSpec | None, adapter: str | Path | None) -> AdapterHandle:
    """Freeze ``model`` and put trainable LoRA layers into its language model, in place.

    A new adapter changes nothing at first (``lora_B`` = 0, ``lora_A`` drawn from ``lora.seed``, equal on every rank). With
    ``adapter`` its folder's weights are loaded; ``lora`` must then agree with it on rank and alpha.

    Raises:
        CheckpointError: the adapter folder is missing, damaged, or doesn't fit the model or ``lora``.
        ValueError: ``lora`` names targets that the language model doesn't have.
    """
    config = _new_config(lora) if adapter is None else _read_config(Path(adapter), lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if lora is None else lora.seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    if adapter is not None:
        _load_weights(model, Path(adapter))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    handle = AdapterHandle(model, config)
    return handle


def _new_config(lora: LoraSpec | None) -> LoraConfig:
    assert lora is not None
    if lora.rank < 1:
        raise ValueError(f"LoRA rank {lora.rank} must be at least 1; rank 0 in a run's configuration means no LoRA")
    names = "|".join(lora.targets or DEFAULT_TARGETS)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=rf".*language_model\..*\.({names})",
        task_type="CAUSAL_LM",
    )


def _read_config(folder: Path, lora: LoraSpec | None) -> LoraConfig:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a PEFT adapter folder: {name} is missing")
    config = LoraConfig.from_pretrained(str(folder))
    if lora is not None and (config.r, float(config.lora_alpha)) != (lora.rank, float(lora.alpha)):
        raise CheckpointError(
            f"the adapter in {folder} has rank {config.r} and alpha {config.lora_alpha}, but the run asks for rank {lora.rank} "
            f"and alpha {lora.alpha}; set lora.rank and lora.alpha to the adapter's"
        )
    config.inference_mode = False
    return config


def _load_weights(model: nn.Module, folder: Path) -> None:
    stored = load_file(str(folder / "adapter_model.safetensors"))
    own = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    wanted = {_PREFIX + name.replace(f".{_NAME}.", "."): name for name in own}
    if set(stored) != set(wanted):
        missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
        raise CheckpointError(
            f"the adapter in {folder} doesn't fit the model: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]})"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            own[wanted[name]].copy_(tensor)
