"""A tiny Qwen2.5-VL with random weights: the paper's architecture, whose video positions differ between libraries."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from pipeline.pretrain.tokenizers import CHAT_TEMPLATE, qwen_tokenizer

_SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def build_tiny_qwen25(folder: Path, seed: int = 0) -> Path:
    """Save model and processor; weights wide enough (std 0.1) that positions matter to the log-probabilities."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # head_dim 32 is the least that vLLM's CPU attention takes
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
        "tokens_per_second": 4,
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _SPECIAL.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    half = [0.5] * 3
    shape = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "image_mean": half, "image_std": half}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 256, "longest_edge": 4096}, **shape),
        video_processor=Qwen2VLVideoProcessor(
            size={"shortest_edge": 256, "longest_edge": 4096 * 32}, do_sample_frames=False, **shape
        ),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
