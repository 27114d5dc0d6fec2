"""``from_pretrained`` that leaves nothing to chance: a model is what its folder says, whole, or it is not loaded.

transformers and diffusers fill weights that a folder lacks with random numbers, or leave them without storage, drop those that the
model does not know, and say so in a warning at most.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError


def load_whole(model_class: Any, path: str | Path, what: str, *, spare: bool = False, **options: Any) -> Any:
    """Return ``model_class.from_pretrained(path, **options)`` of transformers or diffusers, from safetensors alone.

    ``spare``: weights may be left over, those of a head that is not asked for.

    Raises:
        CheckpointError: the folder is not one of ``what`` (an artist's transformer, say); or weights are missing in it, left
            over, or of another shape than its ``config.json`` says.
    """
    try:
        model, found = model_class.from_pretrained(path, output_loading_info=True, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error)
        if "ignore_mismatched_sizes" in reason:
            reason = f"weights have another shape than config.json says ({reason.splitlines()[0]})"
        raise CheckpointError(
            f"{path} is not the folder of {what} with config.json and safetensors weights: {reason}"
        ) from error
    told = [
        f"{len(names)} weights are {kind}: {_some(names)}"
        for kind, key in (("missing", "missing_keys"), ("not the model's", "unexpected_keys"))
        if (names := found[key]) and not (spare and key == "unexpected_keys")
    ]
    told += [f"loading failed: {error}" for error in found.get("error_msgs") or ()]
    if told:
        raise CheckpointError(
            f"{path} is not the folder of {what} that its config.json describes. {'; '.join(told)}. "
            "Copy the whole folder again, with all shards that its index names, or export it again"
        )
    return model


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight that a whole model must bring; one that is tied to another need not stand twice."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def require_whole(
    tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, tied: Collection[str] = ()
) -> None:
    """Raise CheckpointError unless ``tensors`` are all weights of a model with ``shapes``, and none besides but ``tied`` ones."""
    told = [
        f"{len(names)} weights are {kind}: {_some(names)}"
        for kind, names in (
            ("missing", set(shapes) - set(tensors)),
            ("not the model's", set(tensors) - set(shapes) - set(tied)),
            ("of another shape", {n for n, t in tensors.items() if n in shapes and tuple(t.shape) != shapes[n]}),
        )
        if names
    ]
    if told:
        raise CheckpointError(f"{where} are not the weights of the model that is served: {'; '.join(told)}")


def read_config(path: Path) -> dict[str, Any]:
    """Return a model's JSON file; CheckpointError where it cannot be read or holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, found {type(values).__name__}")
    return values


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
