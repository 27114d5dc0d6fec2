"""What autograd keeps of one real block, against the plan's arithmetic; narrow blocks, since bytes are linear in width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from actors.architectures import Architecture, memory
from actors.learner.adapters import linear_layers
from actors.policy.lora import inject_lora
from actors.policy.settings import LoraSection

WIDTH, TOKENS, TEXT, HEAD = 256, 300, 64, 64
ELEMENT = {torch.bfloat16: 2, torch.float32: 4}


def kept(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the storages that the backward pass of ``forward`` reads, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ELEMENT)
def test_wan_block(dtype: torch.dtype, lora: bool) -> None:
    shape = {"num_attention_heads": WIDTH // HEAD, "attention_head_dim": HEAD, "ffn_dim": 6 * WIDTH}
    wan = Architecture("vdm", "narrow", {"transformer": shape}, {"_class_name": "WanPipeline"})
    block: Any = WanTransformerBlock(WIDTH, 6 * WIDTH, WIDTH // HEAD, cross_attn_norm=True).to(dtype)
    if lora:
        inject_lora(block, LoraSection(rank=8, alpha=32.0), wan.blueprint.family().lora_targets)
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype).requires_grad_()
    text, times = torch.randn(1, TEXT, WIDTH, dtype=dtype), torch.randn(1, TOKENS, 6, WIDTH, dtype=dtype)
    rotary = (torch.randn(1, TOKENS, 1, HEAD),) * 2
    planned = wan.shapes.block_bytes(TOKENS, TEXT, ELEMENT[dtype], lora)
    assert kept(block, lambda: block(hidden, text, times, rotary)) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ELEMENT)
def test_wan_image_to_video_block(dtype: torch.dtype, lora: bool) -> None:
    """A second attention in each block, to the image's tokens, which stand before the caption's 512."""
    shape = {"num_attention_heads": WIDTH // HEAD, "attention_head_dim": HEAD, "ffn_dim": 6 * WIDTH}
    shape |= {"in_channels": 36, "image_dim": 80, "added_kv_proj_dim": WIDTH}
    tower = {"hidden_size": 80, "image_size": 224, "patch_size": 14}
    parts = {"transformer": shape, "image_encoder": tower}
    wan = Architecture("vdm", "narrow", parts, {"_class_name": "WanImageToVideoPipeline"})
    block: Any = WanTransformerBlock(WIDTH, 6 * WIDTH, WIDTH // HEAD, cross_attn_norm=True, added_kv_proj_dim=WIDTH).to(
        dtype
    )
    if lora:
        inject_lora(block, LoraSection(rank=8, alpha=32.0), wan.blueprint.family().lora_targets)
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype).requires_grad_()
    text, times = torch.randn(1, 257 + 512, WIDTH, dtype=dtype), torch.randn(1, TOKENS, 6, WIDTH, dtype=dtype)
    rotary = (torch.randn(1, TOKENS, 1, HEAD),) * 2
    planned = wan.shapes.block_bytes(TOKENS, 512, ELEMENT[dtype], lora)
    assert kept(block, lambda: block(hidden, text, times, rotary)) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ELEMENT)
def test_ltx_block(dtype: torch.dtype, lora: bool) -> None:
    shape = {"num_attention_heads": WIDTH // HEAD, "attention_head_dim": HEAD}
    ltx = Architecture("vdm", "narrow", {"transformer": shape}, {"_class_name": "LTXPipeline"})
    block: Any = LTXVideoTransformerBlock(WIDTH, WIDTH // HEAD, HEAD, WIDTH).to(dtype)
    if lora:
        inject_lora(block, LoraSection(rank=8, alpha=32.0), ltx.blueprint.family().lora_targets)
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype).requires_grad_()
    text, times = torch.randn(1, TEXT, WIDTH, dtype=dtype), torch.randn(1, TOKENS, 6 * WIDTH, dtype=dtype)
    rotary, mask = (torch.randn(1, TOKENS, WIDTH),) * 2, torch.zeros(1, 1, TEXT, dtype=dtype)
    planned = ltx.shapes.block_bytes(TOKENS, TEXT, ELEMENT[dtype], lora)
    assert kept(block, lambda: block(hidden, text, times, rotary, mask)) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    ("config", "layer"), [(Qwen2_5_VLTextConfig, Qwen2_5_VLDecoderLayer), (Qwen3VLTextConfig, Qwen3VLTextDecoderLayer)]
)
def test_decoder_layer(config: Any, layer: Any, lora: bool) -> None:
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": WIDTH // HEAD,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    if config is Qwen3VLTextConfig:
        shape["head_dim"] = HEAD
    settings = config(**shape)
    settings._attn_implementation = "sdpa"
    block = layer(settings, 0).to(torch.bfloat16)
    if lora:
        inject_lora(block, LoraSection(rank=8, alpha=32.0), linear_layers(block))
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16).requires_grad_()
    rotary = (torch.randn(1, TOKENS, HEAD, dtype=torch.bfloat16),) * 2
    planned = memory._language_block_bytes(shape, TOKENS, 2, lora)
    real = kept(block, lambda: block(hidden, position_embeddings=rotary, attention_mask=None))
    assert real == pytest.approx(planned, rel=0.05)
