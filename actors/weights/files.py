"""Weights as ordinary folders: an adapter as PEFT writes it, or the whole model of transformers or diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from actors.records import Weights
from actors.weights.transport import as_tensors, pack
from cluster.errors import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MODELS = ("model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
"""Where a whole model keeps the weights that are trained: a transformers model's own, a WanPipeline's transformer."""


def write_adapter(weights: Weights, folder: str | Path) -> Path:
    """Write ``weights`` (kind ``lora``) as a PEFT adapter folder; vLLM, peft and transformers load it. Returns the
    folder.

    Tensors are written before the configuration, so a folder with a configuration is complete.
    """
    if weights.kind != "lora":
        raise CheckpointError(
            f"weights version {weights.version} are full weights, not an adapter; export the model folder instead"
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(as_tensors(weights), str(target / TENSORS), metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(weights.adapter_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def read_adapter(folder: str | Path, version: int = 0) -> Weights:
    """Read a PEFT adapter folder; CheckpointError says which file is missing or broken."""
    source = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (source / name).is_file():
            raise CheckpointError(
                f"{source} is not an adapter folder: {name} is missing (expected {CONFIG} and {TENSORS})"
            )
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(source / TENSORS))
    except Exception as error:
        raise CheckpointError(f"{source} holds a damaged adapter: {error}") from error
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
    return read_adapter(folder, version) if (Path(folder) / CONFIG).is_file() else read_model(folder, version)
