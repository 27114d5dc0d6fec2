"""The tiny architectures: real Hugging Face and diffusers classes with configurations of about a million parameters.

Responsible for building each model from random weights and saving it as an ordinary folder. Knows nothing of training.
Sizes follow measurements on two CPU cores; the limits that shaped them are noted beside the numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    UMT5Config,
    UMT5EncoderModel,
    VideoMAEConfig,
    VideoMAEImageProcessor,
    VideoMAEModel,
)

from pipeline.data.toy.scene import FRAMES, SIZE

from .tokenizers import CHAT_TEMPLATE, qwen_tokenizer, word_tokenizer

Z_DIM = 16
TEXT_DIM = 64
CAPTION_TOKENS = 16
FLOW_SHIFT = 3.0
_HALF = [0.5, 0.5, 0.5]


def build_tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """A Wan VAE: (B, 3, 9, 32, 32) in -1..1 to (B, 16, 5, 4, 4) latents, 8x in space and 2x in time.

    Patches of 4 and one downsampling instead of Wan's patches of 2 and two: the 3-D convolutions then run on 8x8 cells, which
    is what makes it trainable on a CPU in minutes.
    """
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=32,
        decoder_base_dim=48,
        z_dim=Z_DIM,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        patch_size=4,
        in_channels=48,
        out_channels=48,
        scale_factor_spatial=8,
        scale_factor_temporal=2,
        # The defaults have 16 entries whatever z_dim is; pretraining replaces these by measured ones.
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


def build_tiny_transformer(seed: int = 0) -> WanTransformer3DModel:
    """A Wan DiT of 1.1M parameters over 4x4 latent frames in patches of 2x2, 4 tokens a frame.

    head_dim 32 leaves RoPE room for space and time. Four tokens a frame instead of sixteen cost a quarter, here and in
    every rollout.
    """
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def build_tiny_text_encoder(vocab_size: int, seed: int = 0) -> UMT5EncoderModel:
    """A UMT5 encoder of 2 layers, width 64."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=0,
        eos_token_id=2,
    )
    return UMT5EncoderModel(config).eval()


def vdm_pipeline(
    vae: AutoencoderKLWan, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel
) -> WanPipeline:
    """The parts as a diffusers pipeline, ready for ``save_pretrained``."""
    return WanPipeline(
        tokenizer=word_tokenizer(max_length=CAPTION_TOKENS, clip=False),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=transformer,
    )


def build_tiny_vdm(folder: str | Path, seed: int = 0) -> Path:
    """Saves a random-weight Wan pipeline folder (model_index.json, scheduler, tokenizer, text_encoder, transformer, vae)."""
    vocabulary = len(word_tokenizer(max_length=CAPTION_TOKENS, clip=False))
    parts = build_tiny_vae(seed), build_tiny_transformer(seed), build_tiny_text_encoder(vocabulary, seed)
    vdm_pipeline(*parts).save_pretrained(str(folder), safe_serialization=True)
    return Path(folder)


def clip_processor() -> CLIPProcessor:
    """Tokenizer and image processor for 32x32 frames; other sizes are resized and centre-cropped as CLIP does."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=_HALF,
        image_std=_HALF,
        do_convert_rgb=True,
    )
    return CLIPProcessor(
        image_processor=image_processor, tokenizer=word_tokenizer(max_length=CAPTION_TOKENS, clip=True)
    )


def build_tiny_clip_model(seed: int = 0) -> CLIPModel:
    """A CLIP of 0.4M parameters: patch 8 on 32x32 frames, projection width 64."""
    tokenizer = word_tokenizer(max_length=CAPTION_TOKENS, clip=True)
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CAPTION_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()


def build_tiny_clip(folder: str | Path, seed: int = 0) -> Path:
    """Saves a random-weight CLIP folder: model and processor."""
    build_tiny_clip_model(seed).save_pretrained(str(folder), safe_serialization=True)
    clip_processor().save_pretrained(str(folder))
    return Path(folder)


def build_tiny_video_encoder(folder: str | Path, seed: int = 0) -> Path:
    """Saves a random-weight VideoMAE of 0.35M parameters and its processor: clips (B, 9, 3, 32, 32) to 48 tokens of width 96.

    A token spans 3 frames of 8x8 pixels, so that the first layer sees motion.
    """
    torch.manual_seed(seed)
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=FRAMES,
        tubelet_size=3,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    VideoMAEModel(config).save_pretrained(str(folder), safe_serialization=True)
    size = {"height": SIZE, "width": SIZE}
    processor = VideoMAEImageProcessor(size={"shortest_edge": SIZE}, crop_size=size, image_mean=_HALF, image_std=_HALF)
    processor.save_pretrained(str(folder))
    return Path(folder)


def vlm_processor() -> Qwen3VLProcessor:
    """Patch 8, merge 2, temporal patch 2. Images and videos share mean = std = 0.5: vLLM normalises both alike."""
    shape = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "image_mean": _HALF, "image_std": _HALF}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **shape),
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64 * 32}, do_sample_frames=False, **shape
        ),
        tokenizer=qwen_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_vlm_model(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of 0.5M parameters. head_dim 32 is the least that vLLM's CPU attention takes; mrope sections sum to its half."""
    tokenizer = qwen_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|video_pad|>")}
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 96,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "hidden_act": "gelu_pytorch_tanh",
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_tiny_vlm(folder: str | Path, seed: int = 0) -> Path:
    """Saves a random-weight VLM folder: model, tokenizer, image and video processors, chat template."""
    build_tiny_vlm_model(seed).save_pretrained(str(folder), safe_serialization=True)
    vlm_processor().save_pretrained(str(folder))
    return Path(folder)
