"""Frames as an artist's transformer and its losses read them: latents of the VAE, embeddings of the image encoder, each made once.

Responsible for caching them by content, and for what a process without these models says. How a family encodes is ``family``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.policy.cache import Cache, content_key
from actors.vdm.family import Family
from actors.vdm.files import Parts
from actors.vdm.frames import frames_to_video
from cluster.errors import CheckpointError


class FrameEncoder:
    """Encodes frames with the frozen models of ``parts``, which are on ``device``. Three caches of ``cache_bytes`` each."""

    def __init__(self, family: Family, parts: Parts, device: torch.device, cache_bytes: int) -> None:
        self._family, self._device = family, device
        self._vae: Any = parts.vae if parts.has_encoder else None
        self._image_encoder = parts.image_encoder
        self._latents: Cache[Tensor] = Cache(cache_bytes)
        self._images: Cache[Tensor] = Cache(cache_bytes)
        self._targets: Cache[Tensor] = Cache(cache_bytes)

    def references(self, frames: np.ndarray, num_frames: int | None) -> Tensor:
        """Return ``Family.encode_condition`` of reference frames uint8 (n, H, W, 3) of a clip of ``num_frames``: (C, n', h, w)."""
        if self._vae is None:
            raise CheckpointError(_missing("reference frames cannot be encoded", "vae_encoder"))
        return self._latents.get(
            (content_key(frames), num_frames),
            lambda: self._family.encode_condition(self._vae, frames, self._device, num_frames),
        )

    def image(self, frames: np.ndarray) -> Tensor | None:
        """Return ``Family.embed_image`` of reference frames uint8 (n, H, W, 3): (tokens, D); None where the family has none."""
        if not self._family.sees_image:
            return None
        encoder = self._image_encoder
        if encoder is None:
            raise CheckpointError(_missing("reference frames cannot be embedded", "image_encoder"))
        return self._images.get(content_key(frames), lambda: self._family.embed_image(encoder, frames))

    def targets(self, targets: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> Tensor:
        """Return the latents (B, C, F, h, w) of answers uint8 (T, H, W, 3).

        references: the frames uint8 (n, H, W, 3) that each is conditioned on; empty: none. Those that the family's clips begin
        with (``Geometry.given``) are encoded in front of the answer. BadSampleError for sizes that the model does not take.
        """
        if self._vae is None:
            raise CheckpointError(_missing("target frames cannot be encoded", "vae_encoder"))
        family = self._family
        geometry, shown = family.geometry, len(references[0]) if references else 0
        latents = family.reference_latents(shown)
        for frames in targets:
            geometry.latent_shape(len(frames), frames.shape[1], frames.shape[2], latents)
        if geometry.given:
            given = [frames[-geometry.given :] for frames in references]
            targets = [np.concatenate(pair) for pair in zip(given, targets, strict=True)]
        keys = [content_key(frames) for frames in targets]
        rows = {key: self._targets.find(key) for key in keys}
        new = {key: frames for key, frames in zip(keys, targets) if rows[key] is None}
        if new:
            videos = torch.stack([frames_to_video(frames) for frames in new.values()]).to(self._device)
            for key, row in zip(new, family.encode(self._vae, videos)):
                rows[key] = self._targets.put(key, row.clone())
        return torch.stack([rows[key] for key in keys])

    def counters(self) -> dict[str, float]:
        """Return how many clips' reference frames were encoded, and asked for, since the start."""
        asked = self._latents.misses + self._latents.hits
        return {"references": float(self._latents.misses), "references_asked": float(asked)}


def _missing(what: str, component: str) -> str:
    return f"{what}: the policy was loaded without the component {component!r}"
