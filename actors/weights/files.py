"""Weights as ordinary folders: an adapter as PEFT writes it, or the whole model of transformers or diffusers.

Responsible for the files and nothing else. Whether an adapter fits a model is ``actors.learner.adapters``'. Tensors are read and
written without Ray; :class:`Weights`, which travel, need it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.records import Weights
from cluster.errors import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MODELS = ("model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
"""Where a whole model keeps the weights that are trained: a transformers model's own, a diffusers pipeline's transformer."""
_PREFIX = "base_model.model."


def is_adapter(folder: str | Path) -> bool:
    """Return whether ``folder`` says that it is an adapter."""
    return (Path(folder) / CONFIG).is_file()


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's configuration and tensors; CheckpointError says which file is missing or broken."""
    source = Path(folder)
    missing = [name for name in (CONFIG, TENSORS) if not (source / name).is_file()]
    if missing:
        raise CheckpointError(f"{source} is not a PEFT adapter folder: {' and '.join(missing)} not found in it")
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(source / TENSORS))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{source} holds a damaged adapter: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} holds a damaged adapter: {CONFIG} is not an object")
    return config, tensors


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, diffusers: str | None = None
) -> Path:
    """Write PEFT-named ``tensors`` as an adapter that vLLM, peft and transformers load; returns the folder.

    ``diffusers`` names a pipeline class, and adds the file of the same weights that its ``load_lora_weights`` reads. Tensors are
    written before the configuration, so a folder with a configuration is complete.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if diffusers is not None:
        pipelines = importlib.import_module("diffusers")  # takes seconds

        bare = {name.removeprefix(_PREFIX): tensor.clone() for name, tensor in plain.items()}
        shape = {name: config[name] for name in ("r", "lora_alpha", "target_modules")}
        save = getattr(pipelines, diffusers).save_lora_weights
        save(target, transformer_lora_layers=bare, transformer_lora_adapter_metadata=shape)
    save_file(plain, str(target / TENSORS), metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def write_adapter(weights: Weights, folder: str | Path) -> Path:
    """Write ``weights`` (kind ``lora``) as a PEFT adapter folder, and return the folder."""
    if weights.kind != "lora":
        raise CheckpointError(
            f"weights version {weights.version} are full weights, not an adapter; export the model folder instead"
        )
    from actors.weights.transport import as_tensors

    return write_folder(folder, weights.adapter_config, as_tensors(weights))


def read_adapter(folder: str | Path, version: int = 0) -> Weights:
    """Read a PEFT adapter folder; CheckpointError says which file is missing or broken."""
    from actors.weights.transport import pack

    config, tensors = read_folder(folder)
    return pack(version, "lora", tensors, config)


def read_model(folder: str | Path, version: int = 0) -> Weights:
    """Read a whole model's weights (kind ``full``), in one file or in shards; CheckpointError says what is missing."""
    from actors.weights.transport import pack

    source = Path(folder)
    for name in MODELS:
        whole, index = source / name, source / f"{name}.index.json"
        if not whole.is_file() and not index.is_file():
            continue
        try:
            shards = {whole}
            if index.is_file():
                shards = {
                    index.parent / s for s in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                }
            tensors = {name: tensor for shard in sorted(shards) for name, tensor in load_file(str(shard)).items()}
        except Exception as error:
            raise CheckpointError(f"{source} holds a damaged model: {error}") from error
        return pack(version, "full", tensors)
    raise CheckpointError(f"{source} is not a model folder: it has none of {', '.join(MODELS)}, nor their shards")


def read_weights(folder: str | Path, version: int = 0) -> Weights:
    """Read what a learner exported: an adapter where the folder has ``adapter_config.json``, else a whole model."""
    return read_adapter(folder, version) if is_adapter(folder) else read_model(folder, version)
