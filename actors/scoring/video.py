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


_ARGUMENTS = {"rescale": False, "resize": False, "return_features": True}
"""What the common I3D export must be told: pixels are as it wants them, and features are asked for, not probabilities."""


class TorchScriptExtractor:
    """A TorchScript network that takes float32 (1, 3, T, S, S) in [−1, 1] and returns (1, D).

    That is the interface of the common ``i3d_torchscript`` export (S = 224), whose file is to be named with
    ``name="i3d"``: only then is the metric called plain FVD. Its switches ``rescale``, ``resize`` and
    ``return_features`` are set where the network has them: without the last it would return class probabilities.
    Clips shorter than ``min_frames`` are stretched by repeating frames, because I3D's temporal strides need 10 at least.

    Loading a TorchScript file means that its code will run here: use only a file that you trust. Raises CheckpointError
    for a file that is none, or whose network does not take such a clip or returns something else.
    """

    def __init__(
        self, path: str | Path, name: str, *, size: int = 224, min_frames: int = 10, device: str | None = None
    ) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file; the video extractor is a TorchScript file")
        self.name, self.size, self.min_frames = name, size, min_frames
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.network = torch.jit.load(str(path), map_location=self.device).eval()
        except RuntimeError as error:
            raise CheckpointError(f"{path} is not a TorchScript file: {error}") from error
        known = {argument.name for argument in self.network.forward.schema.arguments}
        self._arguments = {name: value for name, value in _ARGUMENTS.items() if name in known}
        try:
            self.dim = len(self(np.zeros((min_frames, 32, 32, 3), np.uint8)))
        except (RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: the network cannot take float32 (1, 3, {min_frames}, {size}, {size}): "
                f"{str(error).strip().splitlines()[-1]}"
            ) from error

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Return the feature (D,) of uint8 ``frames`` (T, H, W, 3), resized bilinearly to a square."""
        clip = resample_frames(np.asarray(frames), max(len(frames), self.min_frames))
        pixels = torch.from_numpy(np.array(clip)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pixels = torch.nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.network(pixels.permute(1, 0, 2, 3)[None], **self._arguments)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 1:
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise CheckpointError(f"video extractor {self.name} returned {shape}, expected (1, D)")
        return features[0].float().cpu().numpy()
