"""A diffusers WanPipeline folder, read and written part by part, so that a process loads only what it uses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, UMT5EncoderModel

from actors.loading import load_whole
from cluster.errors import CheckpointError, ConfigError

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
COMPONENTS = ("transformer", "vae_encoder", "vae_decoder", "text_encoder")


@dataclass(frozen=True)
class Parts:
    """The models of one pipeline; None is what was not asked for."""

    folder: Path
    transformer: Any
    vae: Any
    vae_config: Mapping[str, Any]
    has_encoder: bool
    has_decoder: bool
    text_encoder: Any
    tokenizer: Any


def pipeline_folder(path: str | Path) -> Path:
    """Return the local folder of a WanPipeline folder or hub name; CheckpointError where a part is missing."""
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path)))
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise CheckpointError(f"{folder} is not a diffusers WanPipeline folder: it has no {part}/ in it")
    return folder


def load_vae(folder: Path, *, encoder: bool = True, decoder: bool = True) -> Any:
    """Return the AutoencoderKLWan of a pipeline folder, float32, without the half that is not asked for."""
    vae = load_whole(AutoencoderKLWan, folder / "vae", "an AutoencoderKLWan", torch_dtype=torch.float32)
    if not decoder:
        vae.decoder = vae.post_quant_conv = None
    if not encoder:
        vae.encoder = vae.quant_conv = None
    return vae


def load_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the UMT5 encoder of a pipeline folder and its tokenizer."""
    encoder = load_whole(UMT5EncoderModel, folder / "text_encoder", "a UMT5 encoder", dtype=dtype)
    return encoder, AutoTokenizer.from_pretrained(folder / "tokenizer")


def load_parts(path: str | Path, dtype: torch.dtype, components: Sequence[str] = COMPONENTS) -> Parts:
    """Load ``components`` of a WanPipeline folder or hub name; the VAE stays float32, as Wan's is meant to be used."""
    unknown = set(components) - set(COMPONENTS)
    if unknown or "transformer" not in components:
        raise ConfigError(
            f"components {sorted(components)}: choose from {', '.join(COMPONENTS)}, 'transformer' always among them"
        )
    folder = pipeline_folder(path)
    transformer = load_whole(
        WanTransformer3DModel, folder / "transformer", "a WanTransformer3DModel", torch_dtype=dtype
    )
    vae = text_encoder = tokenizer = None
    if {"vae_encoder", "vae_decoder"} & set(components):
        vae = load_vae(folder, encoder="vae_encoder" in components, decoder="vae_decoder" in components)
    if "text_encoder" in components:
        text_encoder, tokenizer = load_text_encoder(folder, dtype)
    config = AutoencoderKLWan.load_config(folder / "vae")
    if transformer.config.in_channels != config["z_dim"]:
        raise CheckpointError(
            f"{folder}: the transformer takes {transformer.config.in_channels} latent channels, the VAE makes "
            f"{config['z_dim']}; only text-to-video Wan pipelines fit (image-to-video ones concatenate channels)"
        )
    has_encoder, has_decoder = (vae is not None and getattr(vae, half) is not None for half in ("encoder", "decoder"))
    return Parts(folder, transformer, vae, config, has_encoder, has_decoder, text_encoder, tokenizer)


def save_full(
    source: Path, folder: str | Path, transformer: Any, state: Mapping[str, Tensor] | None, text_encoder: Any = None
) -> None:
    """Write a WanPipeline folder: ``source``'s, with this transformer (and text encoder, where it was trained) in the
    place of its own.

    ``state`` is the transformer's gathered state dict where the module itself is sharded.
    """
    target = Path(folder)
    if target.resolve() == source.resolve():
        raise CheckpointError(f"export to {target} would overwrite the model it was loaded from; choose another folder")
    replaced = {"transformer"} | ({"text_encoder"} if text_encoder is not None else set())
    target.mkdir(parents=True, exist_ok=True)
    # The pipeline alone: a folder that a training made may also hold its checkpoints, captions and tracking store.
    index = source / "model_index.json"
    parts = set(json.loads(index.read_text("utf-8"))) if index.is_file() else set(_PARTS)
    for entry in source.iterdir():
        if entry.is_dir() and entry.name in parts - replaced:
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        elif entry.is_file() and (entry.name == index.name or entry.name.startswith(("README", "LICENSE"))):
            shutil.copy2(entry, target / entry.name)
    if state is not None:
        with torch.device("meta"):
            whole = WanTransformer3DModel.from_config(transformer.config)
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
