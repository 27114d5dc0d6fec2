"""Features of whole videos for the Fréchet distance: the published I3D, or any other TorchScript network.

The default features need no file: they are made from CLIP's (``rewards.frechet.clip_frames_feature``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cluster.errors import CheckpointError
from rewards.similarity import resample_frames


class VideoExtractor(Protocol):
    """Something that turns one uint8 (T, H, W, 3) clip into a float32 (D,) feature; ``name`` names the metric."""

    name: str

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return the clip's feature."""
        ...


class TorchScriptExtractor:
    """A TorchScript network that takes float32 (1, 3, T, S, S) in [−1, 1] and returns (1, D).

    That is the interface of the common ``i3d_torchscript`` export (S = 224), whose file is to be named with
    ``name="i3d"``: only then is the metric called plain FVD. Clips shorter than ``min_frames`` are stretched by
    repeating frames, because I3D's temporal strides need 10 at least.
    """

    def __init__(
        self, path: str | Path, name: str, *, size: int = 224, min_frames: int = 10, device: str = "cpu"
    ) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file; the video extractor is a TorchScript file")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise CheckpointError(f"{path} is not a TorchScript file: {error}") from error
        self.name, self.size, self.min_frames, self.device = name, size, min_frames, device

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return the feature (D,) of uint8 ``frames`` (T, H, W, 3), resized bilinearly to a square."""
        clip = resample_frames(np.asarray(frames), max(len(frames), self.min_frames))
        pixels = torch.from_numpy(np.array(clip)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pixels = torch.nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.network(pixels.permute(1, 0, 2, 3)[None])
        if features.ndim != 2 or len(features) != 1:
            raise CheckpointError(f"video extractor {self.name} returned {tuple(features.shape)}, expected (1, D)")
        return features[0].float().cpu().numpy()
