"""Weights as ordinary folders: an adapter as PEFT writes it, or the whole model of transformers or diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from actors.learner.peft_folder import is_adapter, read_folder, write_folder
from actors.records import Weights
from actors.weights.transport import as_tensors, pack
from cluster.errors import CheckpointError

MODELS = ("model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
"""Where a whole model keeps the weights that are trained: a transformers model's own, a WanPipeline's transformer."""


def write_adapter(weights: Weights, folder: str | Path) -> Path:
    """Write ``weights`` (kind ``lora``) as a PEFT adapter folder, and return the folder."""
    if weights.kind != "lora":
        raise CheckpointError(
            f"weights version {weights.version} are full weights, not an adapter; export the model folder instead"
        )
    return write_folder(folder, weights.adapter_config, as_tensors(weights))


def read_adapter(folder: str | Path, version: int = 0) -> Weights:
    """Read a PEFT adapter folder; CheckpointError says which file is missing or broken."""
    config, tensors = read_folder(folder)
    return pack(version, "lora", tensors, config)


def read_model(folder: str | Path, version: int = 0) -> Weights:
    """Read a whole model's weights (kind ``full``), in one file or in shards; CheckpointError says what is missing."""
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
