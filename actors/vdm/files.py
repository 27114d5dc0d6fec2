"""A diffusers pipeline folder, read and written part by part, so that a process loads only what it uses."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, CLIPImageProcessor

from actors.loading import load_whole
from actors.vdm.families import PARTS, Blueprint, read_blueprint
from actors.vdm.image_encoder import ImageEncoder
from cluster.errors import CheckpointError, ConfigError

COMPONENTS = ("transformer", "vae_encoder", "vae_decoder", "text_encoder", "image_encoder")
"""What a process may ask for. A pipeline without an image encoder has none to load."""


@dataclass(frozen=True)
class Parts:
    """The models of one pipeline; None is what was not asked for."""

    blueprint: Blueprint
    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    image_encoder: ImageEncoder | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether the VAE is there to encode."""
        return self.vae is not None and self.vae.encoder is not None

    @property
    def has_decoder(self) -> bool:
        """Whether the VAE is there to decode."""
        return self.vae is not None and self.vae.decoder is not None


def open_pipeline(path: str | Path) -> Blueprint:
    """Return what the pipeline folder or hub name ``path`` holds, in a local folder.

    CheckpointError where a part is missing, or where it is of no family that is known here, or cannot be used.
    """
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))
    for part in (*PARTS, "tokenizer"):
        if not (folder / part).is_dir():
            raise CheckpointError(f"{folder} is not a diffusers pipeline folder: it has no {part}/ in it")
    return read_blueprint(folder)


def load_vae(blueprint: Blueprint, *, encoder: bool = True, decoder: bool = True) -> Any:
    """Return the VAE of a pipeline, float32, without the half that is not asked for."""
    vae = _load(blueprint, "vae", torch_dtype=torch.float32)
    if not decoder:
        vae.decoder = vae.post_quant_conv = None
    if not encoder:
        vae.encoder = vae.quant_conv = None
    return vae


def load_text_encoder(blueprint: Blueprint, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the text encoder of a pipeline and its tokenizer."""
    return _load(blueprint, "text_encoder", dtype=dtype), load_tokenizer(blueprint)


def load_tokenizer(blueprint: Blueprint) -> Any:
    """Return the tokenizer of a pipeline's text encoder."""
    return AutoTokenizer.from_pretrained(blueprint.folder / "tokenizer")


def load_image_encoder(blueprint: Blueprint) -> ImageEncoder | None:
    """Return the image encoder of a pipeline, float32, with its processor; None where the pipeline has none."""
    if "image_encoder" not in blueprint.parts:
        return None
    folder = blueprint.folder / "image_processor"
    try:
        processor = CLIPImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not the folder of a CLIPImageProcessor: {error}") from error
    return ImageEncoder(_load(blueprint, "image_encoder", dtype=torch.float32), processor)


def _load(blueprint: Blueprint, part: str, **options: Any) -> Any:
    kind = blueprint.part_class(part)
    return load_whole(kind, blueprint.folder / part, f"a {kind.__name__}", **options)


def load_parts(path: str | Path, dtype: torch.dtype, components: Sequence[str] = COMPONENTS) -> Parts:
    """Load ``components`` of a pipeline folder or hub name; VAE and image encoder stay float32."""
    unknown = set(components) - set(COMPONENTS)
    if unknown or "transformer" not in components:
        raise ConfigError(
            f"components {sorted(components)}: choose from {', '.join(COMPONENTS)}, 'transformer' always among them"
        )
    blueprint = open_pipeline(path)
    transformer = _load(blueprint, "transformer", torch_dtype=dtype)
    vae = text_encoder = tokenizer = None
    if {"vae_encoder", "vae_decoder"} & set(components):
        vae = load_vae(blueprint, encoder="vae_encoder" in components, decoder="vae_decoder" in components)
    if "text_encoder" in components:
        text_encoder, tokenizer = load_text_encoder(blueprint, dtype)
    image_encoder = load_image_encoder(blueprint) if "image_encoder" in components else None
    return Parts(blueprint, transformer, vae, text_encoder, tokenizer, image_encoder)


def save_full(
    blueprint: Blueprint,
    folder: str | Path,
    transformer: Any,
    state: Mapping[str, Tensor] | None,
    text_encoder: Any = None,
) -> None:
    """Write a pipeline folder: that of ``blueprint``, with this transformer (and text encoder, where it was trained) in the
    place of its own.

    ``state`` is the transformer's gathered state dict where the module itself is sharded.
    """
    target, source = Path(folder), blueprint.folder
    if target.resolve() == source.resolve():
        raise CheckpointError(f"export to {target} would overwrite the model it was loaded from; choose another folder")
    replaced = {"transformer"} | ({"text_encoder"} if text_encoder is not None else set())
    target.mkdir(parents=True, exist_ok=True)
    # The pipeline alone: a folder that a training made may also hold its checkpoints, captions and tracking store.
    for entry in source.iterdir():
        if entry.is_dir() and entry.name in set(blueprint.index) - replaced:
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        elif entry.is_file() and entry.name.startswith(("model_index.json", "README", "LICENSE")):
            shutil.copy2(entry, target / entry.name)
    if state is not None:
        with torch.device("meta"):
            whole = blueprint.part_class("transformer").from_config(transformer.config)
        whole.load_state_dict(dict(state), strict=True, assign=True)
        transformer = whole
    transformer.save_pretrained(target / "transformer", safe_serialization=True)
    if text_encoder is not None:
        text_encoder.save_pretrained(target / "text_encoder", safe_serialization=True)


def held_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters in this process; of sharded ones, the shard's."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in module.parameters())


def parameter_hash(modules: Mapping[str, nn.Module | None]) -> str:
    """Return a hash of all parameters except adapters': equal before and after training exactly where the base stayed
    frozen.

    Names are the plain model's, so the hash is the same with and without an injected adapter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for prefix in sorted(modules):
        module = modules[prefix]
        if module is None:
            continue
        tensors = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in module.state_dict().items()
            if "lora_" not in name
        }
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous().reshape(-1)
            digest.update(f"{prefix}.{name}{tensor.dtype}{tuple(tensors[name].shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
