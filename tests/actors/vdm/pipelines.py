"""Tiny random pipelines of each family's members, with the real classes: what the tests of families are run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from pipeline.pretrain.tokenizers import word_tokenizer

TEXT_TOKENS = 16
MEMBERS = ("wan2.1", "wan2.2", "wan i2v", "ltx", "ltx condition")
GIVEN = {"wan i2v": 1}
"""Members whose clips begin with frames of the input: how many. They take so many reference frames, and no others."""


def build(member: str, folder: Path) -> Path:
    """Save the pipeline of ``member`` (of :data:`MEMBERS`) into ``folder``, and return it."""
    torch.manual_seed(1)
    makers = {"wan2.1": _wan21, "wan2.2": _wan22, "wan i2v": _wan_i2v, "ltx": _ltx, "ltx condition": _ltx_condition}
    makers[member]().save_pretrained(str(folder), safe_serialization=True)
    return folder


def _text_encoder(config_class: Any, model_class: Any, tokenizer: Any) -> Any:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return model_class(config_class(vocab_size=len(tokenizer), **shape)).eval()


def _wan(vae: dict[str, Any], transformer: dict[str, Any], pipeline: Any = WanPipeline, **options: Any) -> Any:
    tokenizer = word_tokenizer(max_length=TEXT_TOKENS, clip=False)
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    z = int(vae["z_dim"])
    statistics = {
        "latents_mean": [0.1 * (i % 5 - 2) for i in range(z)],
        "latents_std": [0.8 + 0.05 * (i % 16) for i in range(z)],
    }
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=_text_encoder(UMT5Config, UMT5EncoderModel, tokenizer),
        vae=AutoencoderKLWan(
            num_res_blocks=1, is_residual=True, patch_size=2, in_channels=12, out_channels=12, **statistics, **vae
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(**shape, **transformer),
        **options,
    )


def _wan21() -> Any:
    """Wan's own compression (4x8x8) and latent statistics that matter."""
    vae = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
    return _wan(vae | {"scale_factor_spatial": 8, "scale_factor_temporal": 4}, {"patch_size": (1, 1, 1)})


def _wan_i2v() -> Any:
    """2.1 I2V 14B in small: noise, mask and condition in 36 channels, and an image encoder of 4x4 patches."""
    torch.manual_seed(2)
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder = CLIPVisionModel(
        CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=8, hidden_act="gelu", **tower)
    )
    vae = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
    pipe = _wan(
        vae | {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
        {"patch_size": (1, 2, 2), "in_channels": 36, "out_channels": 16, "image_dim": 24, "added_kv_proj_dim": 64},
        WanImageToVideoPipeline,
        image_encoder=encoder.eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    with torch.no_grad():  # louder than it begins, so that what of the image is not handed on is missed
        for block in pipe.transformer.blocks:
            block.attn2.add_k_proj.weight.mul_(3)
            block.attn2.add_v_proj.weight.mul_(3)
    return pipe


def _wan22() -> Any:
    """TI2V-5B in small: 4x16x16 to 48 channels, another width in the decoder, a time for each token."""
    vae = {"base_dim": 8, "decoder_base_dim": 16, "z_dim": 48, "dim_mult": [1, 1, 2, 2]}
    vae |= {"temperal_downsample": [False, True, True], "scale_factor_spatial": 16, "scale_factor_temporal": 4}
    transformer = {"patch_size": (1, 2, 2), "in_channels": 48, "out_channels": 48}
    return _wan(vae, transformer, expand_timesteps=True)


def _ltx_parts(vae: dict[str, Any]) -> dict[str, Any]:
    tokenizer = word_tokenizer(max_length=TEXT_TOKENS, clip=False)
    shape = {
        "latent_channels": 12,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, True, False),
        "patch_size": 1,
    }
    made = AutoencoderKLLTXVideo(**(shape | vae))
    with torch.no_grad():
        made.latents_mean.copy_(torch.linspace(-0.2, 0.2, 12))
        made.latents_std.copy_(torch.linspace(0.7, 1.3, 12))
        # The posterior's variance vanishes, so that a stock pipeline that draws from it gets its mode.
        made.encoder.conv_out.conv.weight[-1].zero_()
        made.encoder.conv_out.conv.bias[-1] = -30.0
    return {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(T5Config, T5EncoderModel, tokenizer),
        "vae": made.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        "transformer": LTXVideoTransformer3DModel(
            in_channels=12,
            out_channels=12,
            num_attention_heads=2,
            attention_head_dim=24,
            cross_attention_dim=48,
            caption_channels=32,
            num_layers=2,
        ),
    }


def _ltx() -> Any:
    """0.9.0 in small: 8x8x8 to 12 channels, a plain decoder."""
    decoder = {
        "decoder_block_out_channels": (8, 8, 16, 16),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "scaling_factor": 0.9,
    }
    return LTXPipeline(**_ltx_parts(decoder))


def _ltx_condition() -> Any:
    """0.9.1 and later in small: a decoder that has a time and adds noise."""
    decoder = {
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, True, True, True),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
    }
    parts = _ltx_parts(decoder)
    with torch.no_grad():
        for name, parameter in parts["vae"].decoder.named_parameters():
            if "per_channel_scale" in name:  # zero at first: then no noise would be seen
                parameter.fill_(0.1)
    return LTXConditionPipeline(**parts)
