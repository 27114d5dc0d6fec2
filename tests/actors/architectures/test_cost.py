"""The arithmetic of ``cost`` against torch's own count on the meta device, at real size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.architectures import Architecture, architecture, cost
from actors.policy.lora import inject_lora
from actors.policy.settings import LoraSection
from actors.vdm.settings import ConditioningSection
from pipeline.fleet.models import ASSETS

pytestmark = pytest.mark.slow

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WAN22 = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
LTX = "Lightricks/LTX-Video"
WAN14 = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
I2V = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
PAPER = (33, 352, 640, 6)  # frames, height, width, reference frames


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def counted(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def vdm(name: str) -> Architecture:
    return architecture(ASSETS / "vdm" if name == "tiny" else name, "vdm")


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        (WAN, PAPER),
        (WAN, (33, 352, 640, 0)),
        (WAN14, PAPER),
        (WAN22, PAPER),
        ("tiny", (9, 32, 32, 2)),
    ],
)
def test_wan_transformer(name: str, clip: tuple[int, int, int, int]) -> None:
    model = vdm(name)
    module: Any = model.meta("transformer")
    *size, references = clip
    channels, frames, rows, columns = model.shapes.geometry.cells(*size)
    tokens = model.shapes.tokens(*clip)
    sequence = (frames + references) * (rows // 2) * (columns // 2)
    assert tokens.total == sequence and tokens.reference * frames == tokens.target * references
    times = meta(1, sequence) if references else meta(1)
    text = meta(1, tokens.text, module.config.text_dim)
    latents = meta(1, channels, frames + references, rows, columns)
    real = counted(lambda: module(latents, times, text, return_dict=False))
    assert model.shapes.transformer_flops(tokens).total == pytest.approx(real, rel=0.02)


def test_wan_image_to_video() -> None:
    """Channels of mask and condition beside the noise, and a second attention of each block to the image's 257 tokens. Of its 40
    equal blocks four are counted, in seconds less; a small clip, of which the image costs a large part.
    """
    whole, clip = vdm(I2V), (32, 96, 96)
    few = {**whole.components, "transformer": {**whole.components["transformer"], "num_layers": 4}}
    model = replace(whole, components=few)
    module: Any = model.meta("transformer")
    channels, frames, rows, columns = model.shapes.geometry.cells(*clip)
    tokens = model.shapes.tokens(*clip, 0)
    assert (channels, tokens.total) == (16, 9 * 6 * 6)  # the given frame's latents are among the nine
    latents, text, image = meta(1, 36, frames, rows, columns), meta(1, tokens.text, 4096), meta(1, 257, 1280)
    real = counted(lambda: module(latents, meta(1), text, image, return_dict=False))
    assert model.shapes.transformer_flops(tokens).total == pytest.approx(real, rel=0.02)


def test_what_wan_image_to_video_is_conditioned_on() -> None:
    model, how = vdm(I2V), ConditioningSection()
    tower: Any = model.meta("image_encoder")
    encode = counted(lambda: model.meta("vae").encode(meta(1, 3, 5, 96, 96)))  # type: ignore[operator]
    image = counted(lambda: tower(meta(1, 3, 224, 224), output_hidden_states=True))
    assert model.shapes.condition_flops(how, 1, 4, 96, 96).total == pytest.approx(encode + image, rel=0.02)


@pytest.mark.parametrize(("clip", "lora"), [(PAPER, True), ((5, 96, 96, 1), True), ((5, 96, 96, 1), False)])
def test_an_update_of_the_wan_transformer(clip: tuple[int, int, int, int], lora: bool) -> None:
    model = vdm(WAN)
    module: Any = model.meta("transformer")
    if lora:
        inject_lora(module, LoraSection(rank=8, alpha=32.0), model.blueprint.family().lora_targets)
    channels, frames, rows, columns = model.shapes.geometry.cells(*clip[:3])
    tokens = model.shapes.tokens(*clip)
    latents = meta(1, channels, frames + clip[3], rows, columns)
    with FlopCounterMode(display=False) as counter:
        module(latents, meta(1, tokens.total), meta(1, tokens.text, 4096), return_dict=False)[0].sum().backward()
    planned = model.shapes.transformer_flops(tokens).update(lora=lora, checkpointing=False, kl=False, old_pass=False)
    assert planned.total == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("clip", [(33, 352, 640, 6), (33, 352, 640, 0)])
def test_ltx_transformer(clip: tuple[int, int, int, int]) -> None:
    model = vdm(LTX)
    module: Any = model.meta("transformer")
    channels, frames, rows, columns = model.shapes.geometry.cells(*clip[:3])
    tokens = model.shapes.tokens(*clip)
    assert (channels, tokens.total) == (128, (frames + clip[3]) * rows * columns)
    times = meta(1, tokens.total) if clip[3] else meta(1)
    text, mask = meta(1, tokens.text, 4096), meta(1, tokens.text, dtype=torch.bool)
    sizes = {"num_frames": frames + clip[3], "height": rows, "width": columns}
    real = counted(lambda: module(meta(1, tokens.total, channels), text, times, mask, **sizes))
    assert model.shapes.transformer_flops(tokens).total == pytest.approx(real, rel=0.02)


def test_the_papers_clip_is_13200_tokens() -> None:
    tokens = vdm(WAN).shapes.tokens(*PAPER)
    assert (tokens.reference, tokens.target) == (6 * 22 * 40, 9 * 22 * 40)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (WAN, (33, 352, 640)),
        (WAN, (1, 352, 640)),
        (WAN, (17, 480, 832)),
        (WAN22, (17, 352, 640)),
        (LTX, (33, 352, 640)),
        (LTX, (1, 352, 640)),
        ("tiny", (9, 32, 32)),
    ],
)
def test_vae(name: str, size: tuple[int, int, int]) -> None:
    model = vdm(name)
    module: Any = model.meta("vae")
    encode = counted(lambda: module.encode(meta(1, 3, *size)))
    decode = counted(lambda: module.decode(meta(1, *model.shapes.geometry.cells(*size))))
    assert model.shapes.encode_flops(*size).total == pytest.approx(encode, rel=0.02)
    assert model.shapes.decode_flops(*size).total == pytest.approx(decode, rel=0.02)


def test_the_vae_of_ltx_0_9_5() -> None:
    """Its encoder halves space, time and both in turn; its decoder has a time."""
    config = {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "layers_per_block": (4, 6, 6, 2, 2),
        "spatio_temporal_scaling": (True,) * 4,
        "decoder_block_out_channels": (256, 512, 1024),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }
    parts = {"transformer": {"in_channels": 128}, "vae": config}
    model, size = Architecture("vdm", "0.9.5", parts, {"_class_name": "LTXConditionPipeline"}), (33, 352, 640)
    module: Any = model.meta("vae")
    assert model.shapes.geometry.cells(*size) == tuple(module.encode(meta(1, 3, *size)).latent_dist.mode().shape[1:])
    encode = counted(lambda: module.encode(meta(1, 3, *size)))
    decode = counted(lambda: module.decode(meta(1, *model.shapes.geometry.cells(*size)), meta(1)))
    assert model.shapes.encode_flops(*size).total == pytest.approx(encode, rel=0.02)
    assert model.shapes.decode_flops(*size).total == pytest.approx(decode, rel=0.02)


@pytest.mark.parametrize(("name", "tokens"), [(WAN, 40), (WAN, 512), (LTX, 128), ("tiny", 12)])
def test_text_encoder(name: str, tokens: int) -> None:
    model = vdm(name)
    module = model.meta("text_encoder")
    real = counted(lambda: module(meta(1, tokens, dtype=torch.long)))
    assert model.shapes.text_encoder_flops(tokens).total == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", (4, 252, 448)),  # its windows are counted one by one, for seconds
        ("Qwen/Qwen3-VL-4B-Instruct", (16, 256, 448)),
        ("tiny", (9, 32, 32)),
    ],
)
def test_vlm(name: str, frames: tuple[int, int, int]) -> None:
    model = architecture(ASSETS / "vlm" if name == "tiny" else name, "vlm")
    module: Any = model.meta("model")
    tokens = cost.vlm_tokens(model, *frames, text=90)
    vision = model.components["model"]["vision_config"]
    pixels = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    grid = torch.tensor([tokens.grid])  # read as numbers, so not on the meta device
    vision_real = counted(lambda: _vision(module.model.visual, meta(tokens.patches, pixels), grid))
    assert cost.vision_flops(model, tokens).total == pytest.approx(vision_real, rel=0.02)
    width = module.config.text_config.hidden_size
    length, new = tokens.prompt + 200, 200

    def language() -> None:
        positions = meta(3, 1, length, dtype=torch.long)
        hidden = module.model.language_model(
            inputs_embeds=meta(1, length, width), position_ids=positions, use_cache=False
        ).last_hidden_state
        module.lm_head(hidden[:, -new:])

    real = vision_real + counted(language)
    assert cost.completion_flops(model, tokens, new).total == pytest.approx(real, rel=0.02)
    # Eight behind one prompt are a row of their own length, which the model reads as any other; each has an eighth of it.
    length, new = tokens.prompt + 8 * 200, 8 * 200
    row = vision_real + counted(language)
    assert 8 * cost.completion_flops(model, tokens, 200, 8).total == pytest.approx(row, rel=0.02)


def _vision(tower: Any, pixels: torch.Tensor, grid: torch.Tensor) -> Any:
    """The tower on the meta device; what it reads from the grid alone is computed beforehand, on the CPU."""
    from transformers import vision_utils

    merge, config = tower.spatial_merge_size, tower.config
    ready = {"position_ids": vision_utils.get_vision_position_ids(grid, merge).to("meta")}
    ready["cu_seqlens"], _ = vision_utils.get_vision_attention_seqlens(grid, config)
    if hasattr(tower, "window_size"):
        ready["window_index"], ready["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        ready["window_index"] = ready["window_index"].to("meta")
    else:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        ready |= {"interp_indices": indices.to("meta"), "interp_weights": weights.to("meta")}
    return tower(pixels, grid, **ready)


def test_qwen_prompts_have_the_tokens_that_the_processor_makes() -> None:
    """28 pixels per token of Qwen2.5-VL, 32 of Qwen3-VL, two frames each: arXiv 2502.13923, section 2.1."""
    qwen25 = architecture("Qwen/Qwen2.5-VL-3B-Instruct", "vlm")
    assert cost.vlm_tokens(qwen25, 16, 252, 448, 0).video == 8 * 9 * 16
    assert cost.vlm_tokens(qwen25, 9, 352, 640, 0).grid == (5, 26, 46)  # odd frames and sides are rounded
    assert cost.vlm_tokens(architecture("Qwen/Qwen3-VL-4B-Instruct", "vlm"), 16, 256, 448, 0).video == 8 * 8 * 14


def test_clip() -> None:
    model = architecture("openai/clip-vit-large-patch14", "clip")
    module: Any = model.meta("model")
    image = counted(lambda: module.get_image_features(meta(1, 3, 224, 224)))
    text = counted(lambda: module.get_text_features(meta(1, 77, dtype=torch.long)))
    assert cost.clip_image_flops(model).total == pytest.approx(image, rel=0.02)
    assert cost.clip_text_flops(model).total == pytest.approx(text, rel=0.02)
