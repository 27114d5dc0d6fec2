"""Wan's VAE, and how pixels, latents and tokens relate: clips and reference frames to normalised latents, latents to clips.

Reference frames become clean latents, each encoded alone (arXiv 2511.16669, section on the VDM), or as one clip, which is what VANS'
released code does. Not responsible for captions (``text_encoder``), the time of tokens (``family``), sampling
(``actors.vdm.policy``) or caching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.failures import BadSampleError
from actors.vdm.frames import frames_to_video, video_to_frames
from actors.vdm.settings import ConditioningSection

_VAE_CHUNK = 4  # frames that AutoencoderKLWan encodes at a time after the first, whatever its temporal compression


@dataclass(frozen=True)
class Geometry:
    """How pixels, latents and tokens relate in one Wan pipeline."""

    channels: int  # latent channels C
    spatial: int  # pixels per latent cell, VAE
    temporal: int  # frames per latent frame after the first, VAE
    patch: tuple[int, int, int]  # latent cells per token (t, h, w), transformer
    rope_max: int  # most tokens along any axis

    def latent_shape(self, num_frames: int, height: int, width: int, references: int) -> tuple[int, int, int, int]:
        """Return (C, F, h, w) of a clip; BadSampleError names what does not fit and the nearest size that does."""
        chunk = math.lcm(_VAE_CHUNK, self.temporal)
        if num_frames < 1 or num_frames % chunk != 1:
            low = max(num_frames - 1, 0) // chunk * chunk + 1
            raise BadSampleError(
                f"num_frames={num_frames}: Wan's causal VAE takes {chunk}k+1 frames and would drop the rest "
                f"silently; use {low} or {low + chunk}"
            )
        for name, size, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            unit = self.spatial * patch
            if size < unit or size % unit:
                low = max(size // unit, 1) * unit
                raise BadSampleError(
                    f"{name}={size} is not a multiple of {unit} ({self.spatial} pixels per latent x patch {patch}); "
                    f"use {low} or {low + unit}"
                )
        shape = (self.channels, (num_frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial)
        frames = shape[1] + references
        if frames % self.patch[0]:
            raise BadSampleError(
                f"{references} reference + {shape[1]} target latent frames are not a multiple of patch {self.patch[0]}"
            )
        tokens = (frames // self.patch[0], shape[2] // self.patch[1], shape[3] // self.patch[2])
        if max(tokens) > self.rope_max:
            raise BadSampleError(
                f"{num_frames} frames of {height}x{width} with {references} reference frames make {tokens} "
                f"(time, height, width) tokens; this transformer's position embedding ends at {self.rope_max} "
                "(rope_max_seq_len): use fewer or smaller frames"
            )
        return shape


def geometry_of(transformer: Any, vae_config: Any) -> Geometry:
    """Read the geometry from a WanTransformer3DModel and the configuration of an AutoencoderKLWan."""
    config = transformer.config
    return Geometry(
        channels=int(config.in_channels),
        spatial=int(vae_config.get("scale_factor_spatial", 8)),
        temporal=int(vae_config.get("scale_factor_temporal", 4)),
        patch=tuple(config.patch_size),
        rope_max=int(config.rope_max_seq_len),
    )


# --- frames ---------------------------------------------------------------------------------------------------------


# --- VAE ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_videos(vae: Any, videos: Tensor) -> Tensor:
    """Encode (B, 3, T, H, W) in -1..1, T = 4k+1, to normalised latents float32 (B, C, F, h, w); mode, no noise."""
    mean, std = _latent_stats(vae, videos.device)
    latents = vae.encode(videos.to(vae.dtype)).latent_dist.mode()
    return (latents.float() - mean) / std


def encode_condition(vae: Any, frames: np.ndarray, device: torch.device, how: ConditioningSection) -> Tensor:
    """Encode frames uint8 (n, H, W, 3) to the clean latents float32 (C, n', h, w) that the target is conditioned on."""
    if how.references == "clip":
        return encode_clip(vae, frames, device, how.take)
    return encode_references(vae, frames, device)


def encode_clip(vae: Any, frames: np.ndarray, device: torch.device, take: int) -> Tensor:
    """Encode frames uint8 (T, H, W, 3), T = 4k+1, as one clip, and keep ``take`` of its F latent frames: float32 (C, take, h, w).

    They are those at floor(linspace(0, F - 1, take)): VANS' released code. BadSampleError for a T of which the VAE would drop frames.
    """
    chunk = math.lcm(_VAE_CHUNK, int(vae.config.get("scale_factor_temporal", 4)))
    if len(frames) % chunk != 1:
        raise BadSampleError(
            f"an input clip of {len(frames)} frames cannot be encoded: Wan's causal VAE takes {chunk}k+1"
        )
    latents = encode_videos(vae, frames_to_video(frames)[None].to(device))[0]
    picks = torch.linspace(0, latents.shape[1] - 1, take).long()
    return latents[:, picks.to(device)].contiguous()


def encode_references(vae: Any, frames: np.ndarray, device: torch.device) -> Tensor:
    """Encode n frames uint8 (n, H, W, 3), each as a video of its own, to float32 (C, n, h, w).

    One at a time because the causal VAE drops frames that do not fill a chunk of 4. The call's batch is always one
    clip's n frames, so that the sampler and the learner get equal bits.
    """
    videos = frames_to_video(frames[:, None]).to(device)  # (n, 3, 1, H, W)
    return encode_videos(vae, videos)[:, :, 0].transpose(0, 1).contiguous()


@torch.no_grad()
def decode_videos(vae: Any, latents: Tensor) -> Tensor:
    """Decode normalised latents (B, C, F, h, w) to (B, 3, T, H, W) in -1..1, in the VAE's dtype."""
    mean, std = _latent_stats(vae, latents.device)
    return vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]


def decode_latents(vae: Any, latents: Tensor) -> np.ndarray:
    """Decode normalised latents (B, C, F, h, w) to uint8 (B, T, H, W, 3)."""
    return video_to_frames(decode_videos(vae, latents))


def channels_last(module: torch.nn.Module) -> None:
    """Keep the weights of the convolutions of ``module`` with channels last; what they give is the same up to float noise."""
    for part in module.modules():
        if isinstance(part, torch.nn.Conv3d):
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(part, torch.nn.Conv2d):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _latent_stats(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32, device=device)
    mean, std = values.view(2, 1, -1, 1, 1, 1)
    return mean, std


# --- transformer input ----------------------------------------------------------------------------------------------


# --- supervised training --------------------------------------------------------------------------------------------
