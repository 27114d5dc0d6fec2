"""How Wan's text encoder, VAE and transformer are called.

Reference latents stand before the target's along time, and no parameter is new (arXiv 2511.16669, section on the VDM). Their
tokens carry timestep 0, or the target's (``ConditioningSection.time``): then a clip has one time, the model's ordinary input. Wan 2.2
TI2V was trained with clean latents of time 0 before noisy ones.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from actors.vdm.exact_times import ExactTimes
from actors.vdm.family import Family, token_timesteps
from actors.vdm.text_encoder import CaptionReading, Captions


class WanFamily(Family):
    """Wan 2.1 and 2.2, whose sizes stand in their configurations."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    @property
    def reading(self) -> CaptionReading:
        """UMT5, each caption alone; the transformer has no text mask."""
        return CaptionReading(self.blueprint.shapes.text_tokens, prompt_clean)

    def units(self, transformer: Any) -> list[nn.Module]:
        """Return the blocks of a WanTransformer3DModel."""
        return list(transformer.blocks)

    def prepare(self, transformer: Any) -> None:
        """Let the time embedding see exact times."""
        embedder = transformer.condition_embedder
        self.times = ExactTimes(embedder, embedder.timesteps_proj, self.shared_times, two={"timestep_seq_len": 2})

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
        """Return the velocity of the frames behind the references."""
        n = 0 if references is None else references.shape[2]
        inputs = x if references is None else torch.cat([references, x], dim=2)
        apart = n if self.conditioning.time == "zero" else 0
        times = token_timesteps(sigma, apart, x.shape[1:], self.geometry.patch)
        clean = times.shape[1] * n // inputs.shape[2] if apart else 0
        with self.times.exactly(times, clean):
            out = module(
                hidden_states=inputs.to(dtype),
                timestep=times,
                encoder_hidden_states=text.rows.to(dtype),
                return_dict=False,
            )
        return out[0][:, :, n:].float()

    @torch.no_grad()
    def encode(self, vae: Any, videos: Tensor) -> Tensor:
        """Encode with an AutoencoderKLWan and normalise."""
        mean, std = _latent_stats(vae, videos.device)
        latents = vae.encode(videos.to(vae.dtype)).latent_dist.mode()
        return (latents.float() - mean) / std

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode with an AutoencoderKLWan."""
        mean, std = _latent_stats(vae, latents.device)
        return vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]


def _latent_stats(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=torch.float32, device=device)
    mean, std = values.view(2, 1, -1, 1, 1, 1)
    return mean, std


FAMILY = WanFamily
