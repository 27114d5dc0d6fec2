"""Trains the tiny Wan VAE on toy clips, through its own ``encode`` and ``decode``.

Responsible for the loop, the measured latent statistics and the quality line. The bare encoder without its feature cache
would skip temporal downsampling, so nothing shorter than ``encode()`` is ever called.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from actors.records import derive_seed
from actors.vdm.frames import frames_to_video, video_to_frames
from pipeline.data.toy.scene import FRAMES, all_events, render
from pipeline.data.toy.world import draw_scene, make_sample, shown_event

from .loop import Average, Tick, cosine, no_tick
from .muon import MuonAdam

_IMAGES_FIRST = 0.15
"""Share of the steps on single frames alone: a cheap start, and what reference frames need for good."""

_SHORT = 5
"""Frames of the short clips that half of the video steps use: one chunk instead of two costs half."""

_LATENT_NOISE, _LATENT_DECAY = 0.02, 1e-4


def _clips(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random clips of training scenes, uint8 (count, 9, 32, 32, 3); one in eight plays backwards, as input clips do."""
    clips = []
    for _ in range(count):
        scene = draw_scene(rng, "train")
        events = all_events(scene)
        clip = render(scene, events[int(rng.integers(len(events)))])
        clips.append(clip[::-1] if rng.random() < 0.125 else clip)
    return np.stack(clips)


def _batch(rng: np.random.Generator, share: float, batch: int) -> torch.Tensor:
    image = share < _IMAGES_FIRST or rng.random() < 1 / 3
    clips = _clips(rng, batch * 2 if image else batch)
    if image:
        clips = clips[np.arange(len(clips)), rng.integers(FRAMES, size=len(clips))][:, None]
    elif share < 0.75 and rng.random() < 0.5:
        start = int(rng.integers(FRAMES - _SHORT + 1))
        clips = clips[:, start : start + _SHORT]
    return frames_to_video(clips)


def train_vae(vae: AutoencoderKLWan, *, steps: int, seed: int, batch: int = 6, tick: Tick = no_tick) -> None:
    """Trains in place by squared error; noise on the latents keeps them smooth. The weights end as their moving average."""
    rng = np.random.default_rng(derive_seed("vae", seed))
    torch.manual_seed(derive_seed("vae-noise", seed))
    vae.train()
    optimizer = MuonAdam(vae, lr=0.02, adam_lr=2e-3)
    average = Average(vae)
    for step in range(steps):
        video = _batch(rng, step / steps, batch)
        mean = vae.encode(video).latent_dist.mean
        restored = vae.decode(mean + _LATENT_NOISE * torch.randn_like(mean), return_dict=False)[0]
        loss = 4.0 * (restored - video).square().mean() + _LATENT_DECAY * mean.square().mean()
        loss.backward()
        optimizer.step(cosine(step, steps))
        average.update()
        tick(step, steps, float(loss.detach()))
    average.store()
    vae.eval()


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, *, count: int = 128, seed: int = 0) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over training clips: the VAE's latents_mean and latents_std."""
    rng = np.random.default_rng(derive_seed("vae-latents", seed))
    latents = torch.cat([vae.encode(frames_to_video(_clips(rng, 16))).latent_dist.mode() for _ in range(count // 16)])
    flat = latents.transpose(0, 1).flatten(1)
    return [float(v) for v in flat.mean(1)], [float(v) for v in flat.std(1)]


@torch.no_grad()
def vae_quality(vae: AutoencoderKLWan, *, count: int = 96, seed: int = 0, split: str = "val") -> dict[str, float]:
    """PSNR in dB of held-out clips and rest frames, and whether reconstructed ground truth still shows its event."""
    samples = [make_sample(i, split, seed) for i in range(count)]
    clips = np.stack([s.target_frames for s in samples])
    restored = _restore(vae, clips)
    stills = np.stack([s.input_frames[-1:] for s in samples])
    shown = [shown_event(s.scene, clip) == s.event for s, clip in zip(samples, restored, strict=True)]
    return {
        "psnr_clip": _psnr(clips, restored),
        "psnr_still": _psnr(stills, _restore(vae, stills)),
        "follow_reconstructed": float(np.mean(shown)),
    }


def _restore(vae: AutoencoderKLWan, clips: np.ndarray) -> np.ndarray:
    parts = [frames_to_video(clips[i : i + 16]) for i in range(0, len(clips), 16)]
    return np.concatenate([video_to_frames(vae.decode(vae.encode(p).latent_dist.mode()).sample) for p in parts])


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over clips of the peak signal-to-noise ratio in dB."""
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).reshape(len(a), -1).mean(1)
    return float((10.0 * np.log10(255.0**2 / error)).mean())
