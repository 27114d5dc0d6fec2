"""A model folder is loaded whole or not at all: every model of a run, with weights missing, left over, misshapen, or pickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.loading import require_whole, shapes_of
from actors.scoring.clip import ClipScorer
from actors.vdm.families import read_blueprint
from actors.vdm.files import load_parts, load_text_encoder, load_vae
from actors.vlm.loading import load_model
from cluster.errors import CheckpointError
from pipeline.fleet.models import resolve_model

WAN = "diffusion_pytorch_model.safetensors"
MODELS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "thinker": ("vlm", "model.safetensors", load_model),
    "thinker, as the engine checks it": ("vlm", "model.safetensors", lambda f: load_model(f, empty=True)),
    "transformer": ("vdm", f"transformer/{WAN}", lambda f: load_parts(f, torch.float32, ["transformer"])),
    "VAE": ("vdm", f"vae/{WAN}", lambda f: load_vae(read_blueprint(f))),
    "text encoder": (
        "vdm",
        "text_encoder/model.safetensors",
        lambda f: load_text_encoder(read_blueprint(f), torch.float32),
    ),
    "CLIP": ("clip", "model.safetensors", lambda f: ClipScorer(f)),
}


def last_matrix(weights: dict[str, Tensor]) -> str:
    return max(name for name, tensor in weights.items() if tensor.dim() >= 2)


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name in sorted(weights)[::2]}


def extra(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"layers.99.weight": torch.zeros(2, 2)}


def misshapen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {last_matrix(weights): torch.zeros(3, 5)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [(half, r"\d+ weights are missing: "), (extra, r"1 weights are not the model's: layers\.99"), (misshapen, "shape")],
)
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_not_the_models_are_an_error(name: str, change: Any, reason: str, tmp_path: Path) -> None:
    role, file, load = MODELS[name]
    folder = shutil.copytree(resolve_model("tiny", role), tmp_path / "model")  # type: ignore[arg-type]
    load(folder)
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=reason):
        load(folder)


@pytest.mark.parametrize("name", MODELS)
def test_pickled_weights_are_not_read(name: str, tmp_path: Path) -> None:
    role, file, load = MODELS[name]
    folder = shutil.copytree(resolve_model("tiny", role), tmp_path / "model")  # type: ignore[arg-type]
    weights = load_file(folder / file)
    (folder / file).unlink()
    pickled = (
        "pytorch_model.bin" if file.endswith("model.safetensors") and WAN not in file else "diffusion_pytorch_model.bin"
    )
    torch.save(weights, (folder / file).with_name(pickled))
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_5"])
def test_an_architecture_whose_prompts_are_not_known_is_refused(kind: str, tmp_path: Path) -> None:
    """Qwen2-VL's modules have the names of Qwen2.5-VL's, but its positions are others."""
    folder = shutil.copytree(resolve_model("tiny", "vlm"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": kind, "vision_config": {}, "text_config": {}} | {"architectures": config["architectures"]}
        )
    )
    with pytest.raises(CheckpointError, match=f"model_type='{kind}'"):
        load_model(folder)


def test_whole_weights_that_are_published_must_be_the_models() -> None:
    """Embedding and head are tied: the head may come or not."""
    model, _ = load_model(Path(resolve_model("tiny", "vlm")))
    weights, shapes = model.state_dict(), shapes_of(model)
    tied = set(weights) - set(shapes)
    assert bool(tied) == bool(model.config.get_text_config().tie_word_embeddings)
    require_whole(weights, shapes, "these", tied)
    require_whole({name: weights[name] for name in shapes}, shapes, "these", tied)
    name = last_matrix({n: weights[n] for n in shapes})
    with pytest.raises(CheckpointError, match=r"these .* 1 weights are missing"):
        require_whole({n: weights[n] for n in shapes if n != name}, shapes, "these", tied)
    with pytest.raises(CheckpointError, match=r"not the model.s: model\.old\.name"):
        require_whole({**weights, "model.old.name": weights[name]}, shapes, "these", tied)
    with pytest.raises(CheckpointError, match="another shape"):
        require_whole({**weights, name: weights[name][:1]}, shapes, "these", tied)
