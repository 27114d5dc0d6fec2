"""How Wan 2.1 image to video is called, as diffusers' WanImageToVideoPipeline calls it.

The input's last frame is the first of the drawn clip, and no part of the answer. The transformer is given it twice. In channels, each
latent frame has the noisy latents, a mask of four channels (ones on the first latent frame, zeros after it) and the latents of a
clip that shows the frame and then grey. In cross-attention, an image encoder's embedding of it stands before the caption. Nothing
stands before the clip along time, so a clip has one time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from actors.failures import BadSampleError
from actors.vdm.flow_sde import NUM_TRAIN_TIMESTEPS
from actors.vdm.frames import frames_to_video
from actors.vdm.text_encoder import Captions
from actors.vdm.wan.family import WanFamily
from actors.vdm.wan_i2v.shapes import CAPTION_TOKENS


class WanI2vFamily(WanFamily):
    """Wan 2.1 I2V 14B, of 480p and of 720p."""

    def velocity(
        self,
        module: Any,
        x: Tensor,
        sigma: Tensor,
        text: Captions,
        references: Tensor | None,
        dtype: torch.dtype,
        image: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity of the whole clip, the given frame included."""
        if references is None or image is None:
            raise BadSampleError("an image-to-video artist has no frame to begin with; use video.reference_frames: 1")
        mask = x.new_zeros(len(x), self.geometry.temporal, *x.shape[2:])
        mask[:, :, 0] = 1
        times = sigma * NUM_TRAIN_TIMESTEPS
        rows = functional.pad(text.rows, (0, 0, 0, CAPTION_TOKENS - text.rows.shape[1]))
        with self.times.exactly(times):
            out = module(
                hidden_states=torch.cat([x, mask, references], dim=1).to(dtype),
                timestep=times,
                encoder_hidden_states=rows.to(dtype),
                encoder_hidden_states_image=image.to(dtype),
                return_dict=False,
            )
        return out[0].float()

    @torch.no_grad()
    def encode_condition(
        self, vae: Any, frames: np.ndarray, device: torch.device, num_frames: int | None = None
    ) -> Tensor:
        """Encode the input's last frame and grey after it, as many frames as the answer has: (C, F, h, w)."""
        if num_frames is None:
            raise BadSampleError("an image-to-video artist's condition is as long as its clip; num_frames is missing")
        if len(frames) != self.geometry.given:
            raise BadSampleError(f"{len(frames)} frames were given to an image-to-video artist, which begins with one")
        shown = frames_to_video(frames)[None].to(device)
        grey = shown.new_zeros(*shown.shape[:2], num_frames, *shown.shape[3:])  # 0 in -1..1
        return self.encode(vae, torch.cat([shown, grey], dim=2))[0].contiguous()


FAMILY = WanI2vFamily
