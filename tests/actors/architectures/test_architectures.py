"""The models that the runs name, at their real size on the meta device: no weights, no memory.

Published numbers of parameters: the ``total_size`` of each repository's safetensors index, by the bytes of its dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from actors.architectures import Architecture, Role, architecture, known
from cluster.errors import CheckpointError
from pipeline.fleet.models import ASSETS

PUBLISHED = {
    # model.safetensors.index.json: total_size 7 509 245 952 in bfloat16
    ("Qwen/Qwen2.5-VL-3B-Instruct", "vlm", "model"): 3_754_622_976,
    # model.safetensors.index.json: total_size 8 875 631 616 in bfloat16
    ("Qwen/Qwen3-VL-4B-Instruct", "vlm", "model"): 4_437_815_808,
    # transformer/diffusion_pytorch_model.safetensors.index.json: float32
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vdm", "transformer"): 1_418_996_800,
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "vdm", "transformer"): 14_288_491_584,
    # text_encoder/model.safetensors.index.json: total_size 22 723 641 344 in float32
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vdm", "text_encoder"): 5_680_910_336,
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "vdm", "text_encoder"): 5_680_910_336,
    # vae/diffusion_pytorch_model.safetensors, float32
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vdm", "vae"): 126_892_531,
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "vdm", "vae"): 126_892_531,
    # transformer/diffusion_pytorch_model.safetensors.index.json: total_size 19 999 150 848 in float32
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vdm", "transformer"): 4_999_787_712,
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vdm", "text_encoder"): 5_680_910_336,
    # vae/diffusion_pytorch_model.safetensors, float32
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vdm", "vae"): 704_688_668,
    # The published conversion loads every tensor of the checkpoint into this shape (diffusers' convert_wan_to_diffusers.py, strict).
    # By hand, over T2V-14B's 14 288 491 584: 20 more input channels in 2x2 patches (20 * 4 * 5120), two projections of the image
    # with biases and a norm in each of 40 blocks (40 * (2 * (5120 * 5120 + 5120) + 5120)), and the image's embedding: norms of
    # 1280 and 5120, layers of 1280 * 1280 + 1280 and 1280 * 5120 + 5120.
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "vdm", "transformer"): 16_394_878_784,
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "vdm", "text_encoder"): 5_680_910_336,
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "vdm", "vae"): 126_892_531,
    # ViT-H/14's vision tower: 632 076 800 parameters with its projection (OpenCLIP), less 1280 * 1024
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "vdm", "image_encoder"): 630_766_080,
    # "trainable parameters" of a full finetuning in finetrainers' documentation
    ("Lightricks/LTX-Video", "vdm", "transformer"): 1_923_385_472,
    # text_encoder/model.safetensors.index.json (T5 v1.1 XXL): total_size 19 049 242 624 in float32
    ("Lightricks/LTX-Video", "vdm", "text_encoder"): 4_762_310_656,
    # vae/diffusion_pytorch_model.safetensors: 1 676 798 532 bytes in float32, less 256 statistics and 22 912 bytes of names
    ("Lightricks/LTX-Video", "vdm", "vae"): 419_193_649,
    # model.safetensors of openai/clip-vit-large-patch14 without its position ids
    ("openai/clip-vit-large-patch14", "clip", "model"): 427_616_513,
}


def test_every_known_component_has_a_published_size() -> None:
    assert {(name, role, part) for name, role, part in PUBLISHED} == {
        (name, role, part)
        for role in get_args(Role)
        for name in known(role)
        for part in architecture(name, role).components
    }


@pytest.mark.parametrize(("name", "role", "component"), PUBLISHED)
def test_parameters_are_the_published_ones(name: str, role, component: str) -> None:
    assert architecture(name, role).parameters(component) == PUBLISHED[name, role, component]


@pytest.mark.parametrize("role", get_args(Role))
def test_a_folder_says_what_it_holds(role) -> None:
    """The bundled tiny pair: as many parameters as its files have."""
    from safetensors import safe_open

    bundled = architecture(ASSETS / role, role)
    for component in bundled.components:
        folder = ASSETS / role / component if role == "vdm" else ASSETS / role
        (file,) = folder.glob("*.safetensors")
        with safe_open(file, "pt") as tensors:
            stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        module = bundled.meta(component)
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        assert stored.keys() <= shapes.keys()
        assert all(shapes[name] == tuple(value.shape) for name, value in stored.items())
        assert all(parameter.is_meta for parameter in module.parameters())


def test_unknown_names_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Qwen2\.5-VL-3B-Instruct"):
        architecture("Qwen/Qwen9-VL", "vlm")
    with pytest.raises(CheckpointError, match="is a vlm, not a clip"):
        architecture("Qwen/Qwen3-VL-4B-Instruct", "clip")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        architecture(tmp_path, "vlm")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type='llama'"):
        architecture(tmp_path, "vlm")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    with pytest.raises(
        CheckpointError, match="CogVideoXPipeline; the vdm must be one of WanPipeline, WanImageToVideoPipeline"
    ):
        architecture(tmp_path, "vdm")
    with pytest.raises(CheckpointError, match="no component 'vae'"):
        Architecture("clip", "x", {"model": {}}).meta("vae")
