"""At the real models' size, without weights: the released names are all known, and each has a place in its base."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig, get_peft_model

from actors.architectures import architecture
from pipeline.release.thinker import current_name
from tests.pipeline.release.released import TARGETS, old_name, wan_name

pytestmark = pytest.mark.slow

WAN_1_3B = "9269f8db9040a9d860eaca435be61814"
"""By this digest of its weights' names and shapes the release's ``vans/models/wan_video_dit.py`` knows Wan2.1-T2V-1.3B: MD5 of the
sorted list, joined by commas, of each name, and of each name with ":" and its shape's numbers joined by "_"."""


def test_the_artists_weights_have_the_names_and_shapes_that_the_release_knows_it_by() -> None:
    weights = architecture("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vdm").meta("transformer").state_dict()
    released = {wan_name(name): tensor.shape for name, tensor in weights.items()}
    keys = sorted(key for name, shape in released.items() for key in (name, f"{name}:{'_'.join(map(str, shape))}"))
    assert (len(released), hashlib.md5(",".join(keys).encode()).hexdigest()) == (825, WAN_1_3B)
    back = convert_wan_transformer_to_diffusers({name: name for name in released})
    assert back.keys() == weights.keys()
    assert all(wan_name(name) == given for name, given in back.items())


def test_every_adapter_that_the_release_puts_into_the_thinker_has_a_place() -> None:
    model = architecture("Qwen/Qwen2.5-VL-3B-Instruct", "vlm").meta("model")
    weights = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=list(TARGETS)))
    layers = {
        old_name(name).removeprefix("base_model.model.").rpartition(".lora_")[0]
        for name in tuned.state_dict()
        if ".lora_" in name
    }
    tower = {name for name in layers if name.startswith("visual.")}
    assert (len(layers - tower), len(tower)) == (36 * 7, 32 * 3)
    assert {current_name(f"{name}.weight") for name in layers} <= weights.keys()
    assert (
        current_name("model.layers.0.mlp.up_proj.weight") in weights
        and "model.layers.0.mlp.up_proj.weight" not in weights
    )
