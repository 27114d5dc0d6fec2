"""What Wan's shapes cost: Wan 2.1 and 2.2, whose sizes stand in their configurations.

The tests hold the numbers to torch's own counter on the meta device, at the real sizes.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

from actors.flops import Flops, attention, conv, dense
from actors.vdm.shapes import Geometry, Shapes, VdmTokens

VAE_CHUNK = 4
"""Frames that AutoencoderKLWan encodes at a time after the first, whatever its temporal compression."""


class WanShapes(Shapes):
    """A Wan pipeline's numbers."""

    tile = 256
    text_tokens = 512

    def refusal(self) -> str | None:
        """Return what of this pipeline is not text to video by one transformer."""
        into, z = int(self.transformer.get("in_channels", 16)), int(self.vae.get("z_dim", 16))
        if into != z:
            return (
                f"the transformer takes {into} latent channels, the VAE makes {z}; only text-to-video Wan pipelines fit "
                "(image-to-video ones concatenate channels)"
            )
        if (self.blueprint.index.get("transformer_2") or [None])[0] is not None:
            return "it has two transformers, one for much noise and one for little (transformer_2); a policy here is one transformer"
        return None

    @functools.cached_property
    def geometry(self) -> Geometry:
        """How pixels, latents and tokens relate."""
        temporal = int(self.vae.get("scale_factor_temporal", 4))
        t, h, w = self.transformer.get("patch_size", (1, 2, 2))
        return Geometry(
            channels=int(self.vae.get("z_dim", 16)),
            spatial=int(self.vae.get("scale_factor_spatial", 8)),
            temporal=temporal,
            patch=(int(t), int(h), int(w)),
            chunk=math.lcm(VAE_CHUNK, temporal),
            rope_max=int(self.transformer.get("rope_max_seq_len", 1024)),
        )

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return int(self.transformer["num_attention_heads"]) * int(self.transformer["attention_head_dim"])

    @property
    def hidden(self) -> int:
        """Width inside a block's MLP."""
        return int(self.transformer["ffn_dim"])

    def transformer_flops(self, tokens: VdmTokens) -> Flops:
        """Return one forward of one clip."""
        c, d, s, text = self.transformer, self.width, tokens.total, tokens.text
        patch = math.prod(self.geometry.patch)
        times = s if tokens.times else 1
        per_layer = dense(s, d, d) * 6 + dense(s, d, self.hidden) * 2
        embeddings = (
            dense(s, int(c["in_channels"]) * patch, d)
            + dense(times, int(c["freq_dim"]), d)
            + dense(times, d, d) * 7
            + dense(text, int(c["text_dim"]), d)
            + dense(text, d, d)
        )
        layers = self.layers
        return Flops(
            linear=layers * per_layer + dense(s, d, int(c["out_channels"]) * patch),
            attention=layers * (attention(s, s, d) + attention(s, text, d)),
            condition=layers * dense(text, d, d) * 2,
            frozen=embeddings,
        )

    def encode_flops(self, num_frames: int, height: int, width: int) -> Flops:
        """Return the VAE's encoding of one clip, four frames at a time after the first."""
        c = self._vae
        channels = [int(c["base_dim"]) * m for m in (1, *c["dim_mult"])]
        rows, columns, pixels = height // c["patch"], width // c["patch"], int(c["in_channels"])
        total = Flops()
        for frames in (1, *[4] * ((num_frames - 1) // 4)):
            first, t, h, w = frames == 1, frames, rows, columns
            total += conv(t * h * w, pixels, channels[0], 27)
            for i, (into, out) in enumerate(itertools.pairwise(channels)):
                total += _resnets(t * h * w, into, out, int(c["num_res_blocks"]))
                if i < len(c["dim_mult"]) - 1:
                    h, w = h // 2, w // 2
                    total += conv(t * h * w, out, out, 9)
                    if c["temperal_downsample"][i] and not first:
                        t //= 2
                        total += conv(t * h * w, out, out, 3)
            total += _middle(t, h, w, channels[-1]) + conv(t * h * w, channels[-1], 2 * int(c["z_dim"]), 27)
            total += conv(t * h * w, 2 * int(c["z_dim"]), 2 * int(c["z_dim"]), 1)
        return total

    def decode_flops(self, num_frames: int, height: int, width: int) -> Flops:
        """Return the VAE's decoding of one clip."""
        c = self._vae
        z, latent_frames, rows, columns = self.geometry.cells(num_frames, height, width)
        base = int(c.get("decoder_base_dim") or c["base_dim"])
        channels = [base * m for m in (c["dim_mult"][-1], *reversed(c["dim_mult"]))]
        residual, doubling = bool(c.get("is_residual", False)), tuple(reversed(c["temperal_downsample"]))
        total = conv(latent_frames * rows * columns, z, z, 1)
        for chunk in range(latent_frames):
            t, h, w = 1, rows, columns
            total += conv(t * h * w, z, channels[0], 27) + _middle(t, h, w, channels[0])
            for i, (into, out) in enumerate(itertools.pairwise(channels)):
                into = into // 2 if i and not residual else into
                total += _resnets(t * h * w, into, out, int(c["num_res_blocks"]) + 1)
                if i < len(c["dim_mult"]) - 1:
                    if doubling[i] and chunk:
                        total += conv(t * h * w, out, 2 * out, 3)
                        t *= 2
                    h, w = 2 * h, 2 * w
                    total += conv(t * h * w, out, out if residual else out // 2, 9)
            total += conv(t * h * w, channels[-1], int(c["out_channels"]), 27)
        return total

    def block_bytes(self, tokens: int, text: int, element: int, lora: bool) -> float:
        """Return what autograd keeps of one block: fp32 norms and modulation, projections' inputs, q, k, v and output."""
        d = self.width
        float32 = (14 if lora else 20) * 4 * d
        own = (9 if lora else 10) * element * d + 2 * element * self.hidden
        return tokens * (float32 + own) + text * d * (4 * (1 if lora else 2) + 3 * element)

    def sampling_bytes(self, tokens: VdmTokens, element: int) -> float:
        """Return the bytes of the largest moment of one transformer call on one clip, without gradients."""
        modulated = 6 if tokens.times else 0  # float32 vectors per token, where each has a time of its own
        # The MLP's hidden before and after its activation, or attention's six; the residual, and the modulations of the model
        # and their sum with the block's, in float32.
        inside = max(6 * self.width, 2 * self.hidden + 2 * self.width)
        return tokens.total * (element * inside + 4.0 * (2 + 2 * modulated) * self.width)

    def decoding_bytes(self, num_frames: int, height: int, width: int) -> float:
        """Return the bytes of the largest moment of decoding one clip: the VAE works on four frames at a time, in float32."""
        c = self._vae
        channels, pixels = int(c.get("decoder_base_dim") or c["base_dim"]), height * width // c["patch"] ** 2
        # The last upsampling's output (two widths), four tensors of a residual block and a padded one of six frames, and the
        # two frames that each of the last level's causal convolutions remembers.
        return pixels * 4.0 * channels * (2 * 4 + 4 * 4 + 6 + 7 * 2)

    def encoding_bytes(self, num_frames: int, height: int, width: int, references: int) -> float:
        """Return the bytes of the largest moment of encoding: reference frames together, a clip by four beside two it remembers."""
        c = self._vae
        return (references or 6) * (height * width // c["patch"] ** 2) * 4.0 * int(c["base_dim"]) * 6

    @functools.cached_property
    def _vae(self) -> dict[str, Any]:
        """The VAE's configuration with AutoencoderKLWan's defaults; ``patch`` is the side of a pixel patch."""
        return {"in_channels": 3, "out_channels": 3, "patch": int(self.vae.get("patch_size") or 1), **self.vae}


def _resnets(cells: int, into: int, out: int, count: int) -> Flops:
    total = conv(cells, into, out, 1) if into != out else Flops()
    return total + conv(cells, into, out, 27) + conv(cells, out, out, 27) * (2 * count - 1)


def _middle(t: int, h: int, w: int, channels: int) -> Flops:
    per_frame = Flops(attention=attention(h * w, h * w, channels))
    return (
        _resnets(t * h * w, channels, channels, 2)
        + conv(t * h * w, channels, 3 * channels, 1)
        + conv(t * h * w, channels, channels, 1)
        + per_frame * t
    )


SHAPES = WanShapes
