"""An adapter on disk as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``. No Ray here.

Responsible for the two files and nothing else. Whether they fit a model is ``actors.learner.adapters``'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """Return whether ``folder`` says that it is an adapter."""
    return (Path(folder) / CONFIG).is_file()


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors; CheckpointError says which file is missing or broken."""
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


def write_folder(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter that vLLM, peft and transformers load; returns the folder.

    Tensors are written before the configuration, so a folder with a configuration is complete.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        str(target / TENSORS),
        metadata={"format": "pt"},
    )
    (target / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target
