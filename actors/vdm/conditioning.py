"""What goes into the Wan transformer beside noise: reference frames as clean latents, per-token times; and the way
back to frames.

Responsible for geometry checks, VAE encoding and decoding, time concatenation and the flow-matching training pair.
Not responsible for captions (``text``), sampling (``policy``) or caching. No new parameters: reference latents stand
before the target latents along time, their tokens carry timestep 0, and only the target frames of the output are kept
(arXiv 2511.16669, section on the VDM).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.failures import BadSampleError
from actors.vdm.flow_sde import NUM_TRAIN_TIMESTEPS, shift_sigma

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


def select_reference_frames(frames: np.ndarray, n: int) -> np.ndarray:
    """Return n frames spread uniformly over ``frames`` (T, H, W, 3), the last one included; repeats where T < n."""
    if n and not len(frames):
        raise BadSampleError(f"a video without frames has no {n} reference frames")
    picks = np.linspace(0, len(frames) - 1, n) if n > 1 else np.full(n, len(frames) - 1)
    return np.ascontiguousarray(frames[np.rint(picks).astype(int)])


def frames_to_video(frames: np.ndarray) -> Tensor:
    """Return uint8 (..., T, H, W, 3) as float32 (..., 3, T, H, W) in -1..1."""
    if frames.dtype != np.uint8 or frames.shape[-1] != 3:
        raise BadSampleError(f"frames must be uint8 (..., H, W, 3) RGB, got {frames.dtype} {frames.shape}")
    return torch.from_numpy(np.array(frames)).movedim(-1, -4).float() / 127.5 - 1.0


def video_to_frames(video: Tensor) -> np.ndarray:
    """Return float (..., 3, T, H, W) in -1..1 as uint8 (..., T, H, W, 3), rounded as diffusers rounds."""
    unit = (video.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).movedim(-4, -1).cpu().numpy()


# --- VAE ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_videos(vae: Any, videos: Tensor) -> Tensor:
    """Encode (B, 3, T, H, W) in -1..1, T = 4k+1, to normalised latents float32 (B, C, F, h, w); mode, no noise."""
    mean, std = _latent_stats(vae, videos.device)
    latents = vae.encode(videos.to(vae.dtype)).latent_dist.mode()
    return (latents.float() - mean) / std


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


def token_timesteps(sigma: Tensor, references: int, shape: Sequence[int], patch: tuple[int, int, int]) -> Tensor:
    """Return the transformer's timesteps: 1000 sigma on target tokens, 0 on those of the ``references`` leading
    latent frames.

    sigma: (B,) float32; shape: (C, F, h, w) of the target. Without references the result is (B,), the model's
    ordinary input; with them (B, tokens), time slowest as the patch embedding flattens.
    """
    times = sigma * NUM_TRAIN_TIMESTEPS
    if not references:
        return times
    if references % patch[0]:
        raise BadSampleError(f"{references} reference frames do not fill temporal patches of {patch[0]} latent frames")
    per_frame = (shape[2] // patch[1]) * (shape[3] // patch[2])
    clean = times.new_zeros(len(times), references // patch[0] * per_frame)
    noisy = times[:, None].expand(-1, shape[1] // patch[0] * per_frame)
    return torch.cat([clean, noisy], dim=1)


class ExactTimes:
    """Hands the transformer's time embedding the float32 timesteps, whatever they were cast to on the way in.

    FSDP mixed precision casts all of a forward's inputs; in bfloat16 the times 512…1000 would be rounded to multiples
    of 4, and the learner would see another sigma than the sampler.

    With ``shared``, times of single tokens are embedded once for the clip's clean tokens and once for its noisy ones,
    and the two rows are repeated afterwards: the embedding is a function of a token's time alone, and there are two.
    """

    def __init__(self, transformer: Any, shared: bool = False) -> None:
        self.shared = shared
        self._value: Tensor | None = None
        self._counts: tuple[int, int] | None = None  # clean and noisy tokens, where their two times are embedded
        embedder = transformer.condition_embedder
        embedder.timesteps_proj.register_forward_pre_hook(lambda _module, args: self._pick(args))
        # Functions, not methods: a deep copy of the transformer (a learner's frozen one) keeps them, and with them this.
        embedder.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, self._two_times(kwargs)), with_kwargs=True
        )
        embedder.register_forward_hook(lambda _module, _args, out: self._repeated(out))

    def _pick(self, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._value is None else (self._value,)

    def _two_times(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self._counts is None else kwargs | {"timestep_seq_len": 2}

    def _repeated(self, out: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._counts is None:
            return out
        clean, noisy = self._counts
        time, projected, *others = out
        return *(
            torch.cat([rows[:, :1].expand(-1, clean, -1), rows[:, 1:].expand(-1, noisy, -1)], dim=1)
            for rows in (time, projected)
        ), *others

    @contextmanager
    def exactly(self, times: Tensor, clean: int = 0) -> Iterator[None]:
        """Within it, the embedding sees ``times``, float32 (B,) or (B, tokens) with the ``clean`` tokens first."""
        if self.shared and times.ndim == 2 and 0 < clean < times.shape[1]:
            self._counts = (clean, times.shape[1] - clean)
            times = times[:, [0, clean]]
        self._value = times.flatten()
        try:
            yield
        finally:
            self._value = self._counts = None


# --- supervised training --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowMatchingSpec:
    """How the supervised loss samples sigma = shift(sigmoid(N(mean, std))), and the share of captions it drops."""

    logit_mean: float = 0.0
    logit_std: float = 1.0
    caption_dropout: float = 0.1


def sample_sigmas(n: int, spec: FlowMatchingSpec, shift: float, generator: torch.Generator | None) -> Tensor:
    """Return n training sigmas in (0, 1), float32 on the CPU: logit-normal, shifted like the sampler's grid."""
    logits = torch.randn(n, generator=generator) * spec.logit_std + spec.logit_mean
    return shift_sigma(torch.sigmoid(logits), shift)


def noisy_pair(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_sigma, v) = ((1 - sigma) x0 + sigma eps, eps - x0); clean, noise (B, C, F, h, w), sigma (B,)."""
    level = sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * clean + level * noise, noise - clean
