"""What a shape costs: sequence lengths, floating-point operations and bytes, as pure arithmetic on configurations.

No torch and no model here, so that a plan takes milliseconds; the tests hold the numbers to torch's own counter on the meta
device at real size. One multiply-add is two operations. Counted are matrix products, convolutions and attention (in full,
also where a causal mask makes half of it zero, as ``torch.utils.flop_counter`` does); norms and activations are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from actors.architectures.architecture import Architecture

WAN_TEXT_TOKENS = 512  # what every caption is padded to (actors.vdm.wan.text_encoder)


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass, by what training does with them.

    ``linear`` are products with weights, ``attention`` those between tokens. Two more kinds of products with weights have no
    backward pass where only an adapter is trained: ``condition`` on inputs that carry no gradient (captions inside the
    blocks), and ``frozen`` before the first adapter (embeddings, the vision tower), which is not recomputed either.
    """

    linear: float = 0.0
    attention: float = 0.0
    condition: float = 0.0
    frozen: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.condition + self.frozen

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.linear + other.linear,
            self.attention + other.attention,
            self.condition + other.condition,
            self.frozen + other.frozen,
        )

    def __mul__(self, times: float) -> Flops:
        return Flops(self.linear * times, self.attention * times, self.condition * times, self.frozen * times)

    def backward(self, lora: bool) -> Flops:
        """Return the backward pass of this forward pass: gradients of inputs, and of the weights unless they are frozen.

        The adapter's own products (rank / width of the rest) are left out.
        """
        return Flops(self.linear, self.attention * 2) if lora else self * 2

    def update(self, *, lora: bool, checkpointing: bool, kl: bool, old_pass: bool = True) -> Flops:
        """Return one optimizer pass over what this forward pass reads: forward, backward, and where they apply the passes
        for old log-probabilities, for the reference, and for recomputed activations.
        """
        again = replace(self, frozen=0.0) if lora else self
        return self * (1 + old_pass + kl) + again * checkpointing + self.backward(lora)


# --- the video diffusion model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VdmTokens:
    """Tokens of one clip in the Wan transformer: reference frames first, then the clip; captions are padded to ``text``."""

    reference: int
    target: int
    text: int = WAN_TEXT_TOKENS
    one_time: bool = False
    """Whether reference tokens carry the target's time."""

    @property
    def total(self) -> int:
        """Length of the self-attended sequence."""
        return self.reference + self.target

    @property
    def times(self) -> bool:
        """Whether each token has a time of its own."""
        return self.reference > 0 and not self.one_time


def latent_shape(vdm: Architecture, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (C, F, h, w) of a clip of ``num_frames`` = 4k+1 frames."""
    vae = vdm.components["vae"]
    time, space = int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))
    return int(vae["z_dim"]), (num_frames - 1) // time + 1, height // space, width // space


def vdm_tokens(
    vdm: Architecture, num_frames: int, height: int, width: int, references: int, *, one_time: bool = False
) -> VdmTokens:
    """Return the tokens of a clip with ``references`` reference latents of its size; ``one_time``: theirs is the target's."""
    _, frames, rows, columns = latent_shape(vdm, num_frames, height, width)
    t, h, w = vdm.components["transformer"]["patch_size"]
    per_frame = (rows // h) * (columns // w)
    return VdmTokens(references // t * per_frame, frames // t * per_frame, one_time=one_time)


def transformer_flops(vdm: Architecture, tokens: VdmTokens) -> Flops:
    """Return one forward of one clip (double it under guidance).

    Where reference tokens have a time of their own, the time embedding is computed for each token.
    """
    c = vdm.components["transformer"]
    d, s, text = width_of(c), tokens.total, tokens.text
    patch = math.prod(c["patch_size"])
    times = s if tokens.times else 1
    per_layer = _dense(s, d, d) * 6 + _dense(s, d, int(c["ffn_dim"])) * 2
    embeddings = (
        _dense(s, int(c["in_channels"]) * patch, d)
        + _dense(times, int(c["freq_dim"]), d)
        + _dense(times, d, d) * 7
        + _dense(text, int(c["text_dim"]), d)
        + _dense(text, d, d)
    )
    layers = int(c["num_layers"])
    return Flops(
        linear=layers * per_layer + _dense(s, d, int(c["out_channels"]) * patch),
        attention=layers * (_attention(s, s, d) + _attention(s, text, d)),
        condition=layers * _dense(text, d, d) * 2,
        frozen=embeddings,
    )


def text_encoder_flops(vdm: Architecture, tokens: int) -> Flops:
    """Return one caption of ``tokens`` tokens, encoded alone and unpadded, as the embedder does."""
    c = vdm.components["text_encoder"]
    d, inner = int(c["d_model"]), int(c["num_heads"]) * int(c["d_kv"])
    gated = str(c.get("feed_forward_proj", "gated-gelu")).startswith("gated")
    per_layer = _dense(tokens, d, inner) * 4 + _dense(tokens, d, int(c["d_ff"])) * (3 if gated else 2)
    layers = int(c["num_layers"])
    return Flops(layers * per_layer, layers * _attention(tokens, tokens, inner))


def encode_flops(vdm: Architecture, num_frames: int, height: int, width: int) -> Flops:
    """Return the VAE's encoding of one clip; reference frames are clips of one frame each."""
    c = _vae(vdm)
    channels = [int(c["base_dim"]) * m for m in (1, *c["dim_mult"])]
    rows, columns, pixels = height // c["patch"], width // c["patch"], int(c["in_channels"])
    total = Flops()
    for frames in (1, *[4] * ((num_frames - 1) // 4)):
        first, t, h, w = frames == 1, frames, rows, columns
        total += _conv(t * h * w, pixels, channels[0], 27)
        for i, (into, out) in enumerate(itertools.pairwise(channels)):
            total += _resnets(t * h * w, into, out, int(c["num_res_blocks"]))
            if i < len(c["dim_mult"]) - 1:
                h, w = h // 2, w // 2
                total += _conv(t * h * w, out, out, 9)
                if c["temperal_downsample"][i] and not first:
                    t //= 2
                    total += _conv(t * h * w, out, out, 3)
        total += _middle(t, h, w, channels[-1]) + _conv(t * h * w, channels[-1], 2 * int(c["z_dim"]), 27)
        total += _conv(t * h * w, 2 * int(c["z_dim"]), 2 * int(c["z_dim"]), 1)
    return total


def decode_flops(vdm: Architecture, num_frames: int, height: int, width: int) -> Flops:
    """Return the VAE's decoding of one clip."""
    c = _vae(vdm)
    z, latent_frames, rows, columns = latent_shape(vdm, num_frames, height, width)
    base = int(c.get("decoder_base_dim") or c["base_dim"])
    channels = [base * m for m in (c["dim_mult"][-1], *reversed(c["dim_mult"]))]
    residual, doubling = bool(c.get("is_residual", False)), tuple(reversed(c["temperal_downsample"]))
    total = _conv(latent_frames * rows * columns, z, z, 1)
    for chunk in range(latent_frames):
        t, h, w = 1, rows, columns
        total += _conv(t * h * w, z, channels[0], 27) + _middle(t, h, w, channels[0])
        for i, (into, out) in enumerate(itertools.pairwise(channels)):
            into = into // 2 if i and not residual else into
            total += _resnets(t * h * w, into, out, int(c["num_res_blocks"]) + 1)
            if i < len(c["dim_mult"]) - 1:
                if doubling[i] and chunk:
                    total += _conv(t * h * w, out, 2 * out, 3)
                    t *= 2
                h, w = 2 * h, 2 * w
                total += _conv(t * h * w, out, out if residual else out // 2, 9)
        total += _conv(t * h * w, channels[-1], int(c["out_channels"]), 27)
    return total


def _vae(vdm: Architecture) -> dict[str, Any]:
    """Return the VAE's configuration with AutoencoderKLWan's defaults; ``patch`` is the side of a pixel patch."""
    c = dict(vdm.components["vae"])
    return {"in_channels": 3, "out_channels": 3, "patch": int(c.get("patch_size") or 1), **c}


def _resnets(cells: int, into: int, out: int, count: int) -> Flops:
    total = _conv(cells, into, out, 1) if into != out else Flops()
    return total + _conv(cells, into, out, 27) + _conv(cells, out, out, 27) * (2 * count - 1)


def _middle(t: int, h: int, w: int, channels: int) -> Flops:
    per_frame = Flops(attention=_attention(h * w, h * w, channels))
    return (
        _resnets(t * h * w, channels, channels, 2)
        + _conv(t * h * w, channels, 3 * channels, 1)
        + _conv(t * h * w, channels, channels, 1)
        + per_frame * t
    )


# --- the vision-language model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VlmTokens:
    """A prompt with one video: patches (t, h, w) in the vision tower, and tokens in the language model."""

    grid: tuple[int, int, int]
    video: int
    text: int

    @property
    def patches(self) -> int:
        """Tokens of the vision tower."""
        return math.prod(self.grid)

    @property
    def prompt(self) -> int:
        """Tokens of the language model before the completion."""
        return self.video + self.text


def vlm_tokens(vlm: Architecture, frames: int, height: int, width: int, text: int) -> VlmTokens:
    """Return the tokens of ``frames`` frames of height x width and a prompt of ``text`` tokens without its video.

    Sides are rounded to whole merged patches (28 pixels for Qwen2.5-VL, 32 for Qwen3-VL), as the processor does between its
    limits of pixels. ``text`` includes the time stamps that Qwen3-VL writes before each pair of frames.
    """
    v = vlm.components["model"]["vision_config"]
    patch, merge, temporal = int(v["patch_size"]), int(v["spatial_merge_size"]), int(v["temporal_patch_size"])
    rows, columns = (max(1, round(side / (patch * merge))) * merge for side in (height, width))
    grid = (math.ceil(frames / temporal), rows, columns)
    return VlmTokens(grid, math.prod(grid) // merge**2, text)


def vision_flops(vlm: Architecture, tokens: VlmTokens) -> Flops:
    """Return the vision tower's reading of one video."""
    v = vlm.components["model"]["vision_config"]
    d, n, merge = int(v["hidden_size"]), tokens.patches, int(v["spatial_merge_size"]) ** 2
    qwen25 = "fullatt_block_indexes" in v
    depth, full = int(v["depth"]), len(v["fullatt_block_indexes"]) if qwen25 else int(v["depth"])
    channels = int(v.get("in_channels", v.get("in_chans", 3)))
    pixels = channels * int(v["temporal_patch_size"]) * int(v["patch_size"]) ** 2
    mlp = _dense(n, d, int(v["intermediate_size"])) * (3 if qwen25 else 2)
    merger = _dense(n // merge, merge * d, merge * d) + _dense(n // merge, merge * d, int(v["out_hidden_size"]))
    mergers = 1 + len(v.get("deepstack_visual_indexes", ()))
    t, h, w = tokens.grid
    whole = t * _attention(h * w, h * w, d)
    windows = 0.0
    if qwen25:
        side = int(v["window_size"]) // int(v["patch_size"])
        windows = t * sum(_attention(a * b, a * b, d) for a in _pieces(h, side) for b in _pieces(w, side))
    return Flops(
        _dense(n, pixels, d) + depth * (_dense(n, d, d) * 4 + mlp) + mergers * merger,
        full * whole + (depth - full) * windows,
    )


def language_flops(vlm: Architecture, tokens: float, logits: float, context: float = 0) -> Flops:
    """Return the language model's forward over ``tokens`` tokens behind ``context`` cached ones.

    ``logits`` tokens are projected to the vocabulary.
    """
    c = text_config(vlm)
    d, q, kv = int(c["hidden_size"]), *attention_widths(c)
    per_layer = (
        _dense(tokens, d, q) * 2 + _dense(tokens, d, kv) * 2 + _dense(tokens, d, int(c["intermediate_size"])) * 3
    )
    layers = int(c["num_hidden_layers"])
    return Flops(
        layers * per_layer + _dense(logits, d, int(c["vocab_size"])),
        layers * _attention(tokens, context + tokens, q),
    )


def completion_flops(vlm: Architecture, tokens: VlmTokens, new: int, completions: float = 1) -> Flops:
    """Return a learner's forward over one of ``completions`` completions of ``new`` tokens that stand in a row behind one prompt,
    with its share of the prompt and of the vision tower.
    """
    row = Flops(frozen=vision_flops(vlm, tokens).total)
    row += language_flops(vlm, tokens.prompt + completions * new, completions * new)
    return row * (1 / completions)


def generate_flops(vlm: Architecture, tokens: VlmTokens, new: int, completions: int = 1) -> Flops:
    """Return an engine's work for ``completions`` completions of ``new`` tokens of one prompt, which it reads once."""
    once = vision_flops(vlm, tokens) + language_flops(vlm, tokens.prompt, 1)
    decode = language_flops(vlm, new, new, context=tokens.prompt)
    return once + decode * completions


def kv_cache_bytes(vlm: Architecture, tokens: int, element: int = 2) -> int:
    """Return the bytes of keys and values of ``tokens`` tokens in all layers."""
    c = text_config(vlm)
    return 2 * int(c["num_hidden_layers"]) * attention_widths(c)[1] * tokens * element


def text_config(vlm: Architecture) -> Mapping[str, Any]:
    """Return the language model's configuration."""
    config = vlm.components["model"]  # Qwen2.5-VL was published with its language model's keys at the top
    return config.get("text_config", config)


def attention_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the widths of queries and of keys."""
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return heads * size, int(config.get("num_key_value_heads") or heads) * size


# --- the scorer ------------------------------------------------------------------------------------------------------


def clip_image_flops(clip: Architecture) -> Flops:
    """Return one image's features."""
    config = clip.components["model"]
    v = config["vision_config"]
    patches = (int(v["image_size"]) // int(v["patch_size"])) ** 2
    embed = _dense(patches, int(v.get("num_channels", 3)) * int(v["patch_size"]) ** 2, int(v["hidden_size"]))
    return Flops(embed + _dense(1, int(v["hidden_size"]), int(config["projection_dim"]))) + _encoder(v, patches + 1)


def clip_text_flops(clip: Architecture, tokens: int = 77) -> Flops:
    """Return one caption's features."""
    config = clip.components["model"]
    t = config["text_config"]
    return Flops(_dense(1, int(t["hidden_size"]), int(config["projection_dim"]))) + _encoder(t, tokens)


def _encoder(c: Mapping[str, Any], tokens: int) -> Flops:
    d = int(c["hidden_size"])
    per_layer = _dense(tokens, d, d) * 4 + _dense(tokens, d, int(c["intermediate_size"])) * 2
    return Flops(per_layer, _attention(tokens, tokens, d)) * int(c["num_hidden_layers"])


# --- bytes of a learner ----------------------------------------------------------------------------------------------


def lora_parameters(model: Architecture, rank: int) -> int:
    """Return the size of an adapter on the default targets (Wan transformer, or language model of a VLM)."""
    if model.role == "vdm":
        c = model.components["transformer"]
        d, ffn = width_of(c), int(c["ffn_dim"])
        return int(c["num_layers"]) * rank * (8 * 2 * d + 2 * (d + ffn))
    c = text_config(model)
    d, q, kv, ffn = int(c["hidden_size"]), *attention_widths(c), int(c["intermediate_size"])
    return int(c["num_hidden_layers"]) * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + ffn))


# --- pieces ----------------------------------------------------------------------------------------------------------


def width_of(transformer: Mapping[str, Any]) -> int:
    """Return the width of a Wan transformer."""
    return int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])


def _dense(tokens: float, into: int, out: int) -> float:
    return 2.0 * tokens * into * out


def _conv(cells: int, into: int, out: int, kernel: int) -> Flops:
    return Flops(2.0 * cells * into * out * kernel)


def _attention(queries: float, keys: float, width: int) -> float:
    return 4.0 * queries * keys * width


def _pieces(length: int, side: int) -> list[int]:
    """Return the lengths of the windows of ``side`` that cover ``length``."""
    return [side] * (length // side) + ([length % side] if length % side else [])
