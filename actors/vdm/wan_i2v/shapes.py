"""What Wan 2.1 image to video costs, and which image-to-video pipelines are not it.

The tests hold the numbers to torch's own counter on the meta device, at the real size.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from actors.failures import BadSampleError
from actors.flops import Flops, attention, dense, image_tokens, image_tower
from actors.vdm.settings import ConditioningSection
from actors.vdm.shapes import Geometry, VdmTokens
from actors.vdm.wan.shapes import WanShapes

CAPTION_TOKENS = 512
"""Diffusers' attention takes the last 512 rows for the caption's, whatever it is given, and those before them for the image's."""


class WanI2vShapes(WanShapes):
    """A Wan image-to-video pipeline's numbers."""

    text_tokens = CAPTION_TOKENS

    def refusal(self) -> str | None:
        """Return what of this pipeline is not Wan 2.1's: one transformer, one image, in channels and through an encoder."""
        index, transformer = self.blueprint.index, self.transformer
        if (index.get("transformer_2") or [None])[0] is not None:
            return "it has two transformers, one for much noise and one for little (transformer_2); a policy here is one transformer"
        if index.get("expand_timesteps"):
            return "its first frame is a clean latent of time 0 (expand_timesteps); name it WanPipeline in model_index.json"
        into, geometry = int(transformer.get("in_channels", 16)), self.geometry
        wanted = 2 * geometry.channels + geometry.temporal
        if into != wanted:
            return (
                f"the transformer takes {into} latent channels; noise and condition of the VAE's {geometry.channels} each and a "
                f"mask of {geometry.temporal} are {wanted}"
            )
        if transformer.get("pos_embed_seq_len") is not None:
            return "it draws from the first frame to a given last one (pos_embed_seq_len), and an answer's last frame is not known"
        if transformer.get("image_dim") is None or not self.image_encoder:
            return "it has no image encoder (image_encoder/, image_dim of the transformer); known here is Wan 2.1's, which has one"
        made = int(self.image_encoder["hidden_size"])
        if int(transformer["image_dim"]) != made:
            return f"the transformer reads images of width {transformer['image_dim']} (image_dim), the image encoder makes {made}"
        return None

    @functools.cached_property
    def geometry(self) -> Geometry:
        """As Wan's, but a drawn clip begins with the input's last frame."""
        return replace(super().geometry, given=1)

    @property
    def image_tokens(self) -> int:
        """Tokens of the image in each cross-attention."""
        return image_tokens(self.image_encoder)

    def reference_latents(self, conditioning: ConditioningSection, frames: int) -> int:
        """Return 0: what is given stands in channels beside the noise, not before it along time.

        BadSampleError unless it is one frame. ``conditioning.time`` is of reference tokens, and there are none.
        """
        if conditioning.references != "frames":
            raise BadSampleError(
                f"video.conditioning.references={conditioning.references}: this model begins with one given frame, the input's "
                "last, and reads no clip; use video.conditioning.references: frames"
            )
        if frames != 1:
            raise BadSampleError(
                f"video.reference_frames={frames}: this model begins with one given frame, the input's last; use "
                "video.reference_frames: 1"
            )
        return 0

    def transformer_flops(self, tokens: VdmTokens) -> Flops:
        """Return one forward of one clip: Wan's, and each block's attention to the image."""
        d, s, image, width = self.width, tokens.total, self.image_tokens, int(self.transformer["image_dim"])
        into = int(self.transformer.get("added_kv_proj_dim") or d)
        return super().transformer_flops(tokens) + Flops(
            attention=self.layers * attention(s, image, d),
            condition=self.layers * dense(image, into, d) * 2,
            frozen=dense(image, width, width) + dense(image, width, d),
        )

    def condition_flops(
        self, conditioning: ConditioningSection, frames: int, num_frames: int, height: int, width: int
    ) -> Flops:
        """Return the image encoder's reading of the given frame, and the VAE's of a clip that begins with it."""
        return self.encode_flops(num_frames + self.geometry.given, height, width) + image_tower(self.image_encoder)

    def block_bytes(self, tokens: int, text: int, element: int, lora: bool) -> float:
        """Return what autograd keeps of one block: Wan's; the attention to the image, its output and their sum; of each image
        token what the projections read and made, and in float32 what their norm did, where they are trained.
        """
        images = text // CAPTION_TOKENS * self.image_tokens
        own = tokens * 2 * element + images * (3 * element + (0 if lora else 8))
        return super().block_bytes(tokens, text, element, lora) + own * self.width

    def encoding_bytes(self, num_frames: int, height: int, width: int, references: int) -> float:
        """Return the bytes of the largest moment of encoding: of a clip, however many frames are given."""
        return super().encoding_bytes(num_frames, height, width, 0)


SHAPES = WanI2vShapes
