"""What LTX-Video's shapes cost, in both of its pipelines, for all sizes that their configurations give.

The tests hold the numbers to torch's own counter on the meta device, at the real sizes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from actors.flops import Flops, attention, conv, dense
from actors.vdm.shapes import Geometry, Shapes, VdmTokens

_TIME_CHANNELS = 256
"""Sinusoids of a time, before it is embedded."""
_VAE_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "downsample_type": ("conv",) * 4,
    "layers_per_block": (4, 3, 3, 3, 4),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "upsample_factor": (1, 1, 1, 1),
    "patch_size": 4,
    "patch_size_t": 1,
}
_STRIDES = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}


class LtxShapes(Shapes):
    """An LTX-Video pipeline's numbers."""

    tile = 512

    def refusal(self) -> str | None:
        """Return what of this pipeline's transformer does not read latents cell by cell."""
        into, made = int(self.transformer.get("in_channels", 128)), int(self._vae["latent_channels"])
        if into != made:
            return f"the transformer takes {into} latent channels, the VAE makes {made}"
        patches = [int(self.transformer.get(name, 1)) for name in ("patch_size", "patch_size_t")]
        if patches != [1, 1]:
            return (
                f"its transformer packs patches of {patches} latent cells (patch_size, patch_size_t); known here is 1"
            )
        if int(self._vae["patch_size_t"]) != 1:
            return f"its VAE packs {self._vae['patch_size_t']} frames (patch_size_t); known here is 1"
        return None

    @functools.cached_property
    def geometry(self) -> Geometry:
        """How pixels, latents and tokens relate; the VAE's compression is said, or follows from its blocks."""
        c = self._vae
        halvings = 2 ** sum(map(bool, c["spatio_temporal_scaling"]))
        temporal = int(c.get("temporal_compression_ratio") or halvings)
        return Geometry(
            channels=int(c["latent_channels"]),
            spatial=int(c.get("spatial_compression_ratio") or c["patch_size"] * halvings),
            temporal=temporal,
            patch=(1, 1, 1),
            chunk=temporal,
        )

    @property
    def conditioned(self) -> bool:
        """Whether it is the pipeline that was made for clean frames in the clip (0.9.5 and later)."""
        return self.blueprint.pipeline == "LTXConditionPipeline"

    @property
    def text_tokens(self) -> int:
        """Tokens that a caption is padded to; the transformer masks the padding."""
        return 256 if self.conditioned else 128

    @property
    def width(self) -> int:
        """Width of the transformer."""
        heads, size = self.transformer.get("num_attention_heads", 32), self.transformer.get("attention_head_dim", 64)
        return int(heads) * int(size)

    @property
    def hidden(self) -> int:
        """Width inside a block's MLP."""
        return 4 * self.width

    def transformer_flops(self, tokens: VdmTokens) -> Flops:
        """Return one forward of one clip."""
        c, d, s, text = self.transformer, self.width, tokens.total, tokens.text
        channels, times = self.geometry.channels, s if tokens.times else 1
        layers = self.layers
        return Flops(
            linear=layers * (dense(s, d, d) * 6 + dense(s, d, self.hidden) * 2) + dense(s, d, channels),
            attention=layers * (attention(s, s, d) + attention(s, text, d)),
            condition=layers * dense(text, int(c.get("cross_attention_dim", d)), d) * 2,
            frozen=dense(s, channels, d)
            + dense(times, _TIME_CHANNELS, d)
            + dense(times, d, d) * 7
            + dense(text, int(c.get("caption_channels", 4096)), d)
            + dense(text, d, d),
        )

    def text_encoder_flops(self, tokens: int) -> Flops:
        """Return one caption; LTXPipeline's encoder reads its padding too."""
        return super().text_encoder_flops(tokens if self.conditioned else self.text_tokens)

    def encode_flops(self, num_frames: int, height: int, width: int) -> Flops:
        """Return the VAE's encoding of one clip."""
        c = self._vae
        channels = [int(n) for n in c["block_out_channels"]]
        t, h, w = num_frames, height // c["patch_size"], width // c["patch_size"]
        total = conv(t * h * w, int(c["in_channels"]) * c["patch_size"] ** 2, channels[0], 27)
        newer = c["down_block_types"][-1] == "LTXVideo095DownBlock3D"
        pairs = list(itertools.pairwise(channels if newer else [*channels, channels[-1]]))
        for i, (into, out) in enumerate(pairs):
            total += _resnets(t * h * w, into, into, int(c["layers_per_block"][i]))
            if c["spatio_temporal_scaling"][i]:
                kind = c["downsample_type"][i] if newer else "conv"
                if kind == "conv":
                    t, h, w = (t - 1) // 2 + 1, h // 2, w // 2
                    total += conv(t * h * w, into, into, 27)
                else:
                    a, b, d = _STRIDES[kind]
                    total += conv((t + a - 1) * h * w, into, out // (a * b * d), 27)
                    t, h, w = (t + a - 1) // a, h // b, w // d
            if not newer and into != out:
                total += _resnets(t * h * w, into, out, 1)
        total += _resnets(t * h * w, pairs[-1][1], pairs[-1][1], int(c["layers_per_block"][-1]))
        return total + conv(t * h * w, pairs[-1][1], int(c["latent_channels"]) + 1, 27)

    def decode_flops(self, num_frames: int, height: int, width: int) -> Flops:
        """Return the VAE's decoding of one clip."""
        c = self._vae
        z, t, h, w = self.geometry.cells(num_frames, height, width)
        channels = [int(n) for n in reversed(c["decoder_block_out_channels"])]
        layers = [int(n) for n in reversed(c["decoder_layers_per_block"])]
        scaling = list(reversed(c["decoder_spatio_temporal_scaling"]))
        factors = [int(n) for n in reversed(c["upsample_factor"])]
        out = channels[0]
        total = conv(t * h * w, z, out, 27) + _resnets(t * h * w, out, out, layers[0])
        for i, (size, factor) in enumerate(zip(channels, factors)):
            into, out = out // factor, size // factor
            if into != out:
                total += _resnets(t * h * w, into, out, 1)
            if scaling[i]:
                total += conv(t * h * w, out * factor, out * 8, 27)
                t, h, w = 2 * t - 1, 2 * h, 2 * w
            total += _resnets(t * h * w, out, out, layers[i + 1])
        return total + conv(t * h * w, out, int(c["out_channels"]) * c["patch_size"] ** 2, 27)

    def block_bytes(self, tokens: int, text: int, element: int, lora: bool) -> float:
        """Return what autograd keeps of one block: fp32 norms and rotations, projections' inputs, modulation, q, k, v and output."""
        d = self.width
        float32 = (8 if lora else 11) * 4 * d
        own = (15 if lora else 19) * element * d + 2 * element * self.hidden
        return tokens * (float32 + own) + text * d * (4 * (1 if lora else 2) + 3 * element)

    def sampling_bytes(self, tokens: VdmTokens, element: int) -> float:
        """Return the bytes of the largest moment of one transformer call on one clip, without gradients."""
        modulated = 12 if tokens.times else 0  # six vectors per token, and their sum with the block's
        inside = max(6 * self.width, 2 * self.hidden + 2 * self.width)
        return tokens.total * element * (inside + (1 + modulated) * self.width)

    def decoding_bytes(self, num_frames: int, height: int, width: int) -> float:
        """Return the bytes of the largest moment of decoding one clip, all of its frames at once, in float32."""
        c = self._vae
        cells = num_frames * (height // c["patch_size"]) * (width // c["patch_size"])
        # A residual block of the last level: its input, its result, two between them, one of them padded in time.
        return 4.0 * cells * 6 * int(c["decoder_block_out_channels"][0]) // int(c["upsample_factor"][0])

    def encoding_bytes(self, num_frames: int, height: int, width: int, references: int) -> float:
        """Return the bytes of the largest moment of encoding: reference frames together, or a clip, all of it at once."""
        c = self._vae
        cells = (references * 3 or num_frames) * (height // c["patch_size"]) * (width // c["patch_size"])
        return 4.0 * cells * 5 * int(c["block_out_channels"][0])

    @functools.cached_property
    def _vae(self) -> dict[str, Any]:
        """The VAE's configuration with AutoencoderKLLTXVideo's defaults."""
        return {**_VAE_DEFAULTS, **self.vae}


def _resnets(cells: int, into: int, out: int, count: int) -> Flops:
    total = conv(cells, into, out, 1) if into != out else Flops()
    return total + conv(cells, into, out, 27) + conv(cells, out, out, 27) * (2 * count - 1)


SHAPES = LtxShapes
