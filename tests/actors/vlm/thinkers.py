"""Tiny thinkers of other makes than Qwen's, with random weights, their own processors and published forms of chat.

InternVL shows each frame as an image between tags, and has positions on one axis. GLM-4V has M-RoPE, a time stamp behind each pair of
frames, and one fused projection in its MLPs. Weights are wide enough (std 0.1) that frames and positions matter to the
log-probabilities.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)

from pipeline.pretrain.tokenizers import CHAT_TEMPLATE, qwen_tokenizer

HALF = [0.5] * 3
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def tokenizer_of(video: str, **special: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a make's special tokens, and a chat template that writes ``video`` for a video."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=qwen_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        **special,
    )
    made.chat_template = CHAT_TEMPLATE.replace(QWEN_VIDEO, video)
    return made


def text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Two layers; head_dim 32 is the least that vLLM's CPU attention takes."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }


def build_tiny_internvl(folder: Path, seed: int = 0) -> Path:
    """Save model and processor; a frame of 32x32 is four tokens."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_of("<video>\\n", extra_special_tokens={**names, "video_token": "<video>"})
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": [32, 32],
        "patch_size": [8, 8],
        "attention_bias": True,
        "initializer_range": 0.1,
    }
    config = InternVLConfig(
        text_config={"model_type": "qwen2", "tie_word_embeddings": True, **text_config(tokenizer)},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    InternVLForConditionalGeneration(config).eval().save_pretrained(folder)
    shape = {"size": {"height": 32, "width": 32}, "image_mean": HALF, "image_std": HALF}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**shape),
        # Without a size, which is 384x384 then; vLLM shows 32x32, the size of images.
        video_processor=InternVLVideoProcessor(image_mean=HALF, image_std=HALF),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


def build_tiny_glm4v(folder: Path, seed: int = 0) -> Path:
    """Save model and processor; patch 8, merge 2."""
    video = "<|begin_of_video|><|video|><|end_of_video|>"
    names = ("image_start", "image", "image_end", "video_start", "video", "video_end")
    tokens = (
        "<|begin_of_image|>",
        "<|image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|video|>",
        "<|end_of_video|>",
    )
    tokenizer = tokenizer_of(video, additional_special_tokens=list(tokens))
    torch.manual_seed(seed)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "initializer_range": 0.1,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}
    config = Glm4vConfig(
        text_config={**text_config(tokenizer), "rope_parameters": rope, "attention_bias": True},
        vision_config=vision,
        tie_word_embeddings=False,
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in zip(names, tokens, strict=True)
        },
    )
    model = Glm4vForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # zero as they are made
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    shape = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "image_mean": HALF, "image_std": HALF}
    Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size={"shortest_edge": 256, "longest_edge": 4096}, **shape),
        video_processor=Glm4vVideoProcessor(size={"shortest_edge": 256, "longest_edge": 4096 * 32}, **shape),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder
