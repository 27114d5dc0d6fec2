"""A thinker's folder as model and processor, whole and of a kind that can be trained here, or refused with the reason.

Responsible for loading, and for what the learner needs of any make: a processor with a video in it, a fast tokenizer, a chat
template that writes the video once, a language model that LoRA, sharding and recomputation can find. Not responsible for what
vLLM can serve (``actors.vlm.servable``), or for adapters (``actors.vlm.adapter``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from actors.learner.adapters import LANGUAGE_MODEL
from actors.loading import load_whole
from actors.policy.protocol import torch_dtype
from actors.vlm.makes import make_of
from actors.vlm.prompt import render_prompt
from cluster.errors import CheckpointError


def load_model(path: str | Path, dtype: str = "float32", *, empty: bool = False) -> tuple[Any, Any]:
    """Return (model, processor) of a transformers folder; all parameters are trainable, dropout is off.

    With ``empty`` the parameters are on the meta device: the folder is checked, and no memory is taken. Raises
    CheckpointError for a folder that is no such model, not whole, or cannot be trained here.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(path)
    options: dict[str, Any] = {"device_map": "meta"} if empty else {}
    model = load_whole(
        AutoModelForImageTextToText,
        str(path),
        "a VLM",
        dtype=torch_dtype(dtype),
        attn_implementation="sdpa",
        **options,
    )
    model_units(model)
    return model.eval(), processor


def load_processor(path: str | Path) -> Any:
    """Return the model's processor, which engine and learner both take from here.

    Raises:
        CheckpointError: there is none, it takes no video, or the make is not known. The message says which file.
    """
    from transformers import AutoProcessor

    config = load_config(path)
    try:
        make = make_of(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        processor = AutoProcessor.from_pretrained(str(path), **make.options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a VLM from {str(path)!r}: {error}. {_RIGHT}") from error
    _check_processor(processor, path)
    make.prepare(processor)
    return processor


_RIGHT = (
    "It must be a transformers folder (or hub name) of a vision-language model that takes video, with config, safetensors, "
    "processor and chat template files"
)


def load_config(path: str | Path) -> Any:
    """Return the model's configuration. Raises CheckpointError unless transformers has an image-text-to-text model for it."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a VLM from {str(path)!r}: {error}. {_RIGHT}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CheckpointError(
            f"{path}: config.json has model_type={config.model_type!r}, for which transformers has no image-text-to-text model. "
            f"{_RIGHT}"
        )
    return config


def processor_options(path: str | Path) -> dict[str, Any]:
    """Return what vLLM's processor of the model in ``path`` is given, as ours is. Raises as :func:`load_processor`."""
    return dict(make_of(load_config(path)).options)


def _check_processor(processor: Any, path: str | Path) -> None:
    """Raise CheckpointError unless ``processor`` makes tokens and pixels of a chat about one video."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "video_processor", None) is None:
        parts = "tokenizer" if tokenizer is None else "video_processor"
        raise CheckpointError(
            f"{path}: the processor is a {type(processor).__name__} without a {parts} (processor_config.json, "
            "video_preprocessor_config.json); a thinker is shown a video: use a model whose processor takes one"
        )
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{path}: the tokenizer is a {type(tokenizer).__name__}, which is no fast tokenizer; tokenizer.json is missing"
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{path}: tokenizer_config.json has no eos_token, so that no answer could end")
    if getattr(processor, "video_token", None) is None:
        raise CheckpointError(
            f"{path}: the processor is a {type(processor).__name__} that has no video_token, so a prompt cannot say where the video is"
        )
    try:
        render_prompt(processor, "?")
    except Exception as error:  # a template is a program, and fails as it likes
        raise CheckpointError(f"{path}: chat_template.jinja cannot be used: {error}") from error


def language_model(model: Any) -> Any:
    """Return the language model inside ``model``. Raises CheckpointError where transformers keeps it elsewhere."""
    inner = getattr(getattr(model, "model", None), "language_model", None)
    if not isinstance(inner, nn.Module):
        raise CheckpointError(
            f"{type(model).__name__} has no module {LANGUAGE_MODEL.rstrip('.')}, where LoRA, sharding and vLLM's names look for the "
            "language model; use a model that has one"
        )
    return inner


def model_units(model: Any) -> list[nn.Module]:
    """Return what a thinker is sharded and checkpointed by: the language model's layers, then the blocks of what sees.

    They are the modules that transformers itself can recompute in the backward pass. Raises CheckpointError for a language model
    that has none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in language_model(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise CheckpointError(
            f"{type(model).__name__}: transformers cannot recompute the layers of its language model, so it cannot be sharded by them"
        )
    known = {id(m) for m in layers}
    return [*layers, *(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and id(m) not in known)]
