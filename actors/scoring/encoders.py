"""Features of clips by encoders of the transformers library: of whole videos, and of single frames.

Responsible for loading, preprocessing and where in a model's output the features are. Not responsible for what features mean
(``rewards``). On a CPU clips go through one by one, so that a value does not depend on what shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoVideoProcessor

from actors.loading import load_whole
from actors.policy.cache import Cache, content_key
from cluster.errors import CheckpointError
from rewards.similarity import resample_frames


@dataclass(frozen=True)
class Make:
    """How a make of video encoder is asked. ``moments`` are features in time, None where it has only one for a whole clip."""

    frames: Callable[[Any], int]
    """Frames that it takes, from its configuration."""
    clip: Callable[[Any, torch.Tensor], torch.Tensor]
    """(model, output of ``tokens``) → (B, D)."""
    tokens: Callable[[Any, torch.Tensor], torch.Tensor]
    """(model, pixels (B, T, 3, H, W)) → what ``clip`` and ``moments`` read."""
    moments: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    """(model, tokens) → (B, T', D)."""
    video_processor: bool = False


def _by_time(tokens: torch.Tensor, moments: int) -> torch.Tensor:
    """Return the means (B, T', D) over places of tokens (B, T' P, D) that stand in the order of time."""
    return tokens.unflatten(1, (moments, -1)).mean(dim=2)


def _xclip(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    found = model.get_video_features(pixel_values=pixels)
    return found if isinstance(found, torch.Tensor) else found.pooler_output


MAKES: dict[str, Make] = {
    "videomae": Make(
        lambda config: int(config.num_frames),
        lambda model, tokens: tokens.mean(dim=1),
        lambda model, pixels: model(pixel_values=pixels).last_hidden_state,
        lambda model, tokens: _by_time(tokens, model.config.num_frames // model.config.tubelet_size),
    ),
    "vjepa2": Make(
        lambda config: int(config.frames_per_clip),
        lambda model, tokens: tokens.mean(dim=1),
        lambda model, pixels: model.get_vision_features(pixel_values_videos=pixels),
        lambda model, tokens: _by_time(tokens, model.config.frames_per_clip // model.config.tubelet_size),
        video_processor=True,
    ),
    "timesformer": Make(
        lambda config: int(config.num_frames),
        lambda model, tokens: tokens[:, 0],
        lambda model, pixels: model(pixel_values=pixels).last_hidden_state,
        # Behind the class token: places first, and the times of a place side by side.
        lambda model, tokens: tokens[:, 1:].unflatten(1, (-1, model.config.num_frames)).mean(dim=1),
    ),
    "xclip": Make(lambda config: int(config.vision_config.num_frames), lambda model, pooled: pooled, _xclip),
}
"""Makes of video encoders by ``model_type``: another one is another row."""


class VideoEncoder:
    """A frozen video encoder. Features are float32 and not normalised.

    ``path``: a folder, or a name in the hub's cache, with config, safetensors and preprocessor. Raises CheckpointError for one that
    is no video encoder of MAKES.
    """

    def __init__(self, path: str, device: str, dtype: str, *, batch: int, cache_mib: float) -> None:
        config = _config(path)
        if config.model_type not in MAKES:
            raise CheckpointError(f"{path} is a {config.model_type!r}; video encoders here are {', '.join(MAKES)}")
        self.make = MAKES[config.model_type]
        self.model = _model(path, f"a {config.model_type} model", device, dtype)
        loader = AutoVideoProcessor if self.make.video_processor else AutoImageProcessor
        self._processor = _processor(loader, path)
        self._frames, self._device = self.make.frames(config), torch.device(device)
        self._batch = 1 if device == "cpu" else batch
        self._cache = Cache[np.ndarray](int(cache_mib * 2**20))

    def features(self, clips: Sequence[np.ndarray], *, moments: bool) -> list[np.ndarray]:
        """Return (D,), or with ``moments`` (T', D), for each of the uint8 (T, H, W, 3) ``clips``, resampled to the encoder's frames."""
        return _cached(self._cache, clips, lambda part: self._forward(part, moments), self._batch)

    @torch.inference_mode()
    def _forward(self, clips: Sequence[np.ndarray], moments: bool) -> list[np.ndarray]:
        pixels = torch.cat([self._pixels(clip) for clip in clips]).to(self._device, self.model.dtype)
        tokens = self.make.tokens(self.model, pixels)
        read = self.make.moments if moments else self.make.clip
        if read is None:
            raise CheckpointError(
                f"a {self.model.config.model_type} has one feature for a whole clip, and none in time"
            )
        return list(read(self.model, tokens).float().cpu().numpy())

    def _pixels(self, clip: np.ndarray) -> torch.Tensor:
        frames = resample_frames(clip, self._frames)
        if self.make.video_processor:
            video = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2)
            found = self._processor(videos=[video], do_sample_frames=False, return_tensors="pt")
            return found["pixel_values_videos"]
        return self._processor([np.array(frame) for frame in frames], return_tensors="pt")["pixel_values"]


class FrameEncoder:
    """A frozen encoder of pictures, such as DINOv2: one pooled feature for each frame, float32 and not normalised."""

    def __init__(self, path: str, device: str, dtype: str, *, batch: int, cache_mib: float) -> None:
        self.model = _model(path, "a transformers model of pictures", device, dtype)
        self._processor = _processor(AutoImageProcessor, path)
        self._device, self._batch = torch.device(device), 1 if device == "cpu" else batch
        self._cache = Cache[np.ndarray](int(cache_mib * 2**20))

    def features(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return (T, D) for each of the uint8 (T, H, W, 3) ``clips``."""
        return _cached(self._cache, clips, lambda part: [self._forward(clip) for clip in part], self._batch)

    @torch.inference_mode()
    def _forward(self, clip: np.ndarray) -> np.ndarray:
        pixels = self._processor([np.array(frame) for frame in clip], return_tensors="pt")["pixel_values"]
        found = self.model(pixel_values=pixels.to(self._device, self.model.dtype)).pooler_output
        return np.asarray(found.float().cpu().numpy())


def parameters_of(path: str) -> int:
    """Return how many parameters the model in ``path`` has, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModel.from_config(_config(path))
    return sum(p.numel() for p in model.parameters())


def _cached(
    cache: Cache[np.ndarray],
    clips: Sequence[np.ndarray],
    make: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
    batch: int,
) -> list[np.ndarray]:
    keys = [content_key(clip) for clip in clips]
    found: dict[str, np.ndarray | None] = {key: cache.find(key) for key in keys}
    missing = {key: clip for key, clip in zip(keys, clips, strict=True) if found[key] is None}
    names = list(missing)
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        for key, value in zip(part, make([missing[key] for key in part]), strict=True):
            found[key] = cache.put(key, np.array(value))
    return [kept for key in keys if (kept := found[key]) is not None]


def _config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not the folder of a transformers model: {error}") from error


def _model(path: str, what: str, device: str, dtype: str) -> Any:
    model = load_whole(AutoModel, path, what, spare=True, dtype=getattr(torch, dtype))
    return model.to(device).eval().requires_grad_(False)


def _processor(loader: Any, path: str) -> Any:
    try:
        return loader.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has no preprocessor that transformers can read: {error}") from error
