"""What a shape costs thinker and scorer: sequence lengths, floating-point operations and bytes, as arithmetic on configurations.

No torch and no model here, so that a plan takes milliseconds; the tests hold the numbers to torch's own counter on the meta
device at real size. What an artist's shape costs is its family's (``Architecture.shapes``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.architectures.architecture import Architecture
from actors.architectures.thinker import sizes
from actors.flops import Flops, attention, dense, encoder, image_tower

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


def has_grid(vlm: Architecture) -> bool:
    """Return whether the video's tokens follow from its size, on a grid; of other makes the processor must be asked."""
    return {"spatial_merge_size", "temporal_patch_size"} <= vlm.components["model"]["vision_config"].keys()


def vlm_tokens(vlm: Architecture, frames: int, height: int, width: int, text: int) -> VlmTokens:
    """Return the tokens of ``frames`` frames of height x width and a prompt of ``text`` tokens without its video.

    ``vlm`` must have a grid (:func:`has_grid`). Sides are rounded to whole merged patches (28 pixels for Qwen2.5-VL, 32 for Qwen3-VL),
    as the processor does between its limits of pixels. ``text`` includes the time stamps that Qwen3-VL writes before each pair of
    frames.
    """
    v = vlm.components["model"]["vision_config"]
    patch, merge, temporal = int(v["patch_size"]), int(v["spatial_merge_size"]), int(v["temporal_patch_size"])
    rows, columns = (max(1, round(side / (patch * merge))) * merge for side in (height, width))
    grid = (math.ceil(frames / temporal), rows, columns)
    return VlmTokens(grid, math.prod(grid) // merge**2, text)


def vision_flops(vlm: Architecture, tokens: VlmTokens) -> Flops:
    """Return the vision tower's reading of one video; by parameters where its make has no formula (:func:`rough`)."""
    if _vision_by_parameters(vlm):
        return Flops(2.0 * sizes(vlm).vision * tokens.patches)
    v = vlm.components["model"]["vision_config"]
    d, n, merge = int(v["hidden_size"]), tokens.patches, int(v["spatial_merge_size"]) ** 2
    qwen25 = "fullatt_block_indexes" in v
    depth, full = int(v["depth"]), len(v["fullatt_block_indexes"]) if qwen25 else int(v["depth"])
    channels = int(v.get("in_channels", v.get("in_chans", 3)))
    pixels = channels * int(v["temporal_patch_size"]) * int(v["patch_size"]) ** 2
    mlp = dense(n, d, int(v["intermediate_size"])) * (3 if qwen25 else 2)
    merger = dense(n // merge, merge * d, merge * d) + dense(n // merge, merge * d, int(v["out_hidden_size"]))
    mergers = 1 + len(v.get("deepstack_visual_indexes", ()))
    t, h, w = tokens.grid
    whole = t * attention(h * w, h * w, d)
    windows = 0.0
    if qwen25:
        side = int(v["window_size"]) // int(v["patch_size"])
        windows = t * sum(attention(a * b, a * b, d) for a in _pieces(h, side) for b in _pieces(w, side))
    return Flops(
        dense(n, pixels, d) + depth * (dense(n, d, d) * 4 + mlp) + mergers * merger,
        full * whole + (depth - full) * windows,
    )


def language_flops(vlm: Architecture, tokens: float, logits: float, context: float = 0) -> Flops:
    """Return the language model's forward over ``tokens`` tokens behind ``context`` cached ones.

    ``logits`` tokens are projected to the vocabulary. By parameters where its make has no formula (:func:`rough`).
    """
    c = text_config(vlm)
    if _language_by_parameters(vlm):
        return Flops(2.0 * sizes(vlm).language * tokens)
    d, q, kv = int(c["hidden_size"]), *attention_widths(c)
    per_layer = dense(tokens, d, q) * 2 + dense(tokens, d, kv) * 2 + dense(tokens, d, int(c["intermediate_size"])) * 3
    layers = int(c["num_hidden_layers"])
    return Flops(
        layers * per_layer + dense(logits, d, int(c["vocab_size"])),
        layers * attention(tokens, context + tokens, q),
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


def rough(vlm: Architecture) -> tuple[str, ...]:
    """Return the parts whose operations are taken as two for each parameter and token, since their make has no formula here."""
    parts = {"vision tower": _vision_by_parameters(vlm), "language model": _language_by_parameters(vlm)}
    return tuple(part for part, by_parameters in parts.items() if by_parameters)


def _vision_by_parameters(vlm: Architecture) -> bool:
    """The formula is of Qwen's towers, which have windows or features of several depths."""
    return not {"fullatt_block_indexes", "deepstack_visual_indexes"} & vlm.components["model"]["vision_config"].keys()


def _language_by_parameters(vlm: Architecture) -> bool:
    """The formula is of dense decoders with gated MLPs and full attention."""
    c = text_config(vlm)
    dense = {"hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size"} <= c.keys()
    experts = any(c.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    return not dense or experts or not set(c.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}


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
    return Flops(dense(1, int(v["hidden_size"]), int(config["projection_dim"]))) + image_tower(v)


def clip_text_flops(clip: Architecture, tokens: int = 77) -> Flops:
    """Return one caption's features."""
    config = clip.components["model"]
    t = config["text_config"]
    return Flops(dense(1, int(t["hidden_size"]), int(config["projection_dim"]))) + encoder(t, tokens)


# --- bytes of a learner ----------------------------------------------------------------------------------------------


def lora_parameters(model: Architecture, rank: int) -> int:
    """Return the size of an adapter on the default targets (the artist's transformer, or language model of a VLM)."""
    if model.role == "vdm":
        return model.shapes.lora_parameters(rank)
    if _vision_by_parameters(model) or _language_by_parameters(model):
        return rank * sum(into + out for out, into in sizes(model).adapted)
    c = text_config(model)
    d, q, kv, ffn = int(c["hidden_size"]), *attention_widths(c), int(c["intermediate_size"])
    return int(c["num_hidden_layers"]) * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + ffn))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _pieces(length: int, side: int) -> list[int]:
    """Return the lengths of the windows of ``side`` that cover ``length``."""
    return [side] * (length // side) + ([length % side] if length % side else [])
