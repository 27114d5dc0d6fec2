"""Which modules of the real models are adapted, sharded and checkpointed, and what others call them: name by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actors.architectures import architecture, cost, memory
from actors.learner.adapters import fit, linear_layers
from actors.learner.sharding import shard, unit_names
from actors.policy.lora import adapter_config, inject_lora, peft_names, resolved, same_shape
from actors.policy.protocol import trainable_parameters
from actors.policy.settings import LoraSection
from actors.vlm import adapter as vlm_adapter
from actors.vlm.loading import model_units
from actors.weights.files import read_folder, write_folder

pytestmark = pytest.mark.slow

SPEC = LoraSection(rank=8, alpha=32.0)
WAN = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 30, "Wan-AI/Wan2.1-T2V-14B-Diffusers": 40}
QWEN = {"Qwen/Qwen2.5-VL-3B-Instruct": (36, 32), "Qwen/Qwen3-VL-4B-Instruct": (36, 24)}
WAN_LAYERS = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
WAN_LAYERS += ["ffn.net.0.proj", "ffn.net.2"]
QWEN_LAYERS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def adapted_wan(name: str) -> nn.Module:
    model = architecture(name, "vdm")
    return inject_lora(model.meta("transformer"), SPEC, model.blueprint.family().lora_targets)


def adapted_qwen(name: str) -> nn.Module:
    model = architecture(name, "vlm").meta("model")
    vlm_adapter.inject(model, SPEC, None)
    return model


def adapted(name: str) -> tuple[nn.Module, list[nn.Module], list[str]]:
    """The model with its default adapter, its units, and the names that the adapted modules should have."""
    if name in WAN:
        module = adapted_wan(name)
        units = architecture(name, "vdm").blueprint.family().units(module)
        return module, units, [f"blocks.{i}.{p}" for i, p in product(range(WAN[name]), WAN_LAYERS)]
    module = adapted_qwen(name)
    layers = product(range(QWEN[name][0]), QWEN_LAYERS)
    return module, model_units(module), [f"model.language_model.layers.{i}.{p}" for i, p in layers]


@pytest.mark.parametrize("name", [*WAN, *QWEN])
def test_every_projection_of_every_layer_is_adapted_and_nothing_else(name: str) -> None:
    module, _, expected = adapted(name)
    found = {n.removesuffix(".lora_A.default") for n, _ in module.named_modules() if n.endswith(".lora_A.default")}
    assert found == set(expected) and len(expected) == len(found)
    trained = sum(p.numel() for p in trainable_parameters(module))
    assert all("lora_" in n for n, p in module.named_parameters() if p.requires_grad)
    assert trained == cost.lora_parameters(architecture(name, "vdm" if name in WAN else "vlm"), SPEC.rank)


@pytest.mark.parametrize("name", [*WAN, *QWEN])
def test_units_of_sharding_and_checkpointing_are_the_blocks(name: str) -> None:
    module, units, _ = adapted(name)
    if name in WAN:
        expected = [f"blocks.{i}" for i in range(WAN[name])]
    else:
        layers, blocks = QWEN[name]
        expected = [f"model.visual.blocks.{i}" for i in range(blocks)]
        expected += [f"model.language_model.layers.{i}" for i in range(layers)]
    assert sorted(unit_names(module, units)) == sorted(expected)


@pytest.fixture
def eight_ranks() -> Iterator[Any]:
    """A mesh of 8 ranks of which this process is the first; the others do not exist, and nothing is sent."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Qwen/Qwen2.5-VL-3B-Instruct"])
def test_the_learners_own_sharding_takes_the_real_model_apart(name: str, eight_ranks: Any) -> None:
    module, units, _ = adapted(name)
    total = sum(p.numel() for p in module.parameters())
    names = shard(module, units, eight_ranks, torch.bfloat16, checkpointing=True)
    wrapped = {n.removesuffix("._checkpoint_wrapped_module") for n, _ in module.named_modules() if "_wrapped_" in n}
    assert {n for n in wrapped if n in names} == set(names)
    local = sum(p.to_local().numel() for p in module.parameters())  # type: ignore[attr-defined]
    assert local == pytest.approx(total / 8, rel=0.01)
    model = architecture(name, "vdm" if name in WAN else "vlm")
    part = "transformer" if name in WAN else "model"
    planned = memory.learner_bytes(model, tokens=1, parameters=model.parameters(part), lora_rank=8, ranks=8)
    assert planned.parameters == pytest.approx(4 * local, rel=0.01)


@pytest.mark.parametrize("name", QWEN)
def test_vllm_finds_each_adapted_module_under_its_own_name(name: str) -> None:
    """vLLM renames an adapter's tensors by its model class, and then looks for the pieces of its packed projections."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    if "2.5" in name:
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as VllmModel
    else:
        from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as VllmModel
    written = peft_names(adapted_qwen(name).state_dict())
    assert len(written) == 2 * len(QWEN_LAYERS) * QWEN[name][0]
    read = {parse_fine_tuned_lora_name(n, VllmModel.hf_to_vllm_mapper) for n in written}
    modules = {f"language_model.model.layers.{i}.{p}" for i, p in product(range(QWEN[name][0]), QWEN_LAYERS)}
    assert read == {(module, is_a) for module in modules for is_a in (True, False)}
    packed = {piece for pieces in VllmModel.packed_modules_mapping.values() for piece in pieces}
    assert {p.rpartition(".")[2] for p in QWEN_LAYERS} <= packed | {"o_proj", "down_proj"}
    # Full weights are reloaded under the model's own names (WeightsExtension.vans_reload).
    for tensor in architecture(name, "vlm").meta("model").state_dict():
        renamed = VllmModel.hf_to_vllm_mapper._map_name(tensor)
        assert re.match(r"(language_model\.(model|lm_head)|visual)\.", renamed), (tensor, renamed)


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
def test_diffusers_and_peft_read_the_artists_adapter(name: str, tmp_path: Path) -> None:
    """The folder that the policy exports, at real size, into a transformer that never saw our code."""
    from diffusers import WanPipeline

    module = adapted_wan(name)
    tensors = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in peft_names(module.state_dict()).items()}
    write_folder(tmp_path, adapter_config(module), tensors, diffusers="WanPipeline")
    state, metadata = WanPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    names = {f"transformer.blocks.{i}.{p}" for i, p in product(range(WAN[name]), WAN_LAYERS)}
    assert {n.rpartition(".lora_")[0] for n in state} == names and len(state) == 2 * len(names)
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (8, 32)
    config, again = read_folder(tmp_path)
    other: Any = architecture(name, "vdm").meta("transformer")
    layers = linear_layers(other)
    fitted = fit(again, config, layers, "vdm", "here")
    targets = architecture(name, "vdm").blueprint.family().lora_targets
    assert same_shape(fitted.spec, resolved(SPEC, layers, targets)) and again.keys() == tensors.keys()
    other.load_lora_adapter(state, prefix="transformer", metadata=None, low_cpu_mem_usage=True)
    loaded = {n.rpartition(".lora_A.")[0] for n, _ in other.named_parameters() if ".lora_A." in n}
    assert {f"transformer.{n}" for n in loaded} == names
