"""An image as an artist's transformer reads it: hidden states of CLIP's vision tower before its last layer.

Wan 2.1 image to video was trained with these (diffusers' WanImageToVideoPipeline). The tower is frozen, and float32 whatever the
transformer computes in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor


class ImageEncoder:
    """A CLIPVisionModel and its CLIPImageProcessor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self._processor = model.eval().requires_grad_(False), processor

    def to(self, device: torch.device) -> ImageEncoder:
        """Move the model to ``device`` and return this."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """Return float32 (tokens, D) of an image uint8 (H, W, 3), alone: one token of the whole, then one of each patch.

        The processor scales the shorter side to the tower's and cuts the middle out, so of a wide frame the left and right ends
        are not seen here. The latents have them.
        """
        pixels = self._processor(images=PIL.Image.fromarray(image), return_tensors="pt").pixel_values
        states = self.model(pixels.to(self.model.device), output_hidden_states=True).hidden_states
        return states[-2][0].float().clone()
