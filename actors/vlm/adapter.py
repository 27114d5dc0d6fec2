"""LoRA on the VLM's language model: which modules are adapted, and starting from an adapter folder.

Responsible for what is the VLM's own: its vision tower is never adapted, and since the same module names occur there, name
suffixes alone won't do. The rest (seeded injection, names, disabling) is ``actors.policy.lora``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from actors.learner.adapters import LANGUAGE_MODEL, fit, linear_layers
from actors.policy.lora import inject_lora, load_adapter_tensors
from actors.policy.settings import LoraSection
from actors.weights.files import read_folder
from cluster.errors import CheckpointError


def language_model_targets(model: nn.Module, suffixes: Sequence[str] | None) -> list[str]:
    """Return the full names of the language model's linear layers, or of those that are called one of ``suffixes``.

    Raises:
        ValueError: a suffix that names no linear layer of the language model.
    """
    names = [name for name in linear_layers(model) if name.startswith(LANGUAGE_MODEL)]
    if suffixes is None:
        return names
    own = {name.rpartition(".")[2] for name in names}
    if unknown := set(suffixes) - own:
        raise ValueError(
            f"LoRA targets {sorted(unknown)} name no linear layer of the language model; it has {', '.join(sorted(own))}"
        )
    return [name for name in names if name.rpartition(".")[2] in suffixes]


def inject(model: nn.Module, lora: LoraSection | None, adapter: str | Path | None, seed: int = 0) -> None:
    """Freeze ``model`` and put trainable LoRA layers into its language model, in place.

    A new adapter changes nothing at first. With ``adapter``, its folder's weights are loaded, and ``lora`` (where given) must
    agree with it on rank and alpha.

    Raises:
        CheckpointError: the adapter folder is missing, damaged, or doesn't fit the model or ``lora``.
        ValueError: ``lora`` names targets that the language model doesn't have.
    """
    if adapter is None:
        assert lora is not None
        targets = language_model_targets(model, lora.targets or None)
        inject_lora(model, lora.model_copy(update={"targets": targets}), (), seed)
        return
    config, tensors = read_folder(adapter)
    fitted = fit(tensors, config, linear_layers(model), "vlm", str(adapter))
    own = fitted.spec
    if lora is not None and (own.rank, own.alpha) != (lora.rank, float(lora.alpha)):
        raise CheckpointError(
            f"the adapter in {adapter} has rank {own.rank} and alpha {own.alpha:g}, but the run asks for rank {lora.rank} and "
            f"alpha {lora.alpha:g}; set lora.rank and lora.alpha to the adapter's"
        )
    inject_lora(model, own, ())
    load_adapter_tensors(model, fitted.apply(tensors))
