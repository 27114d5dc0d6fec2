"""How LTX-Video's text encoder, VAE and transformer are called.

The transformer reads latents cell by cell as a row of tokens, counts seconds in its position embedding, and masks a caption's
padding. Reference latents stand before the target's along time with time 0, as LTXConditionPipeline lets a clip begin with clean
frames. What that pipeline can do besides (frames in the middle, a strength below 1, noise on the clean frames) is not done here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actors.vdm.exact_times import ExactTimes
from actors.vdm.family import Family, token_timesteps
from actors.vdm.ltx.shapes import LtxShapes
from actors.vdm.text_encoder import CaptionReading, Captions

_SEED = 0
"""Of the noise that some decoders add: the same for every clip, so that equal latents give equal frames."""


class LtxFamily(Family):
    """LTX-Video 0.9 and later: LTXPipeline and LTXConditionPipeline, which differ in how they read captions and positions."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @property
    def _shapes(self) -> LtxShapes:
        shapes = self.blueprint.shapes
        assert isinstance(shapes, LtxShapes)
        return shapes

    @property
    def reading(self) -> CaptionReading:
        """T5; LTXPipeline gives it the padding without a mask, LTXConditionPipeline with one."""
        return CaptionReading(self._shapes.text_tokens, padded=not self._shapes.conditioned)

    def units(self, transformer: Any) -> list[nn.Module]:
        """Return the blocks of an LTXVideoTransformer3DModel."""
        return list(transformer.transformer_blocks)

    def prepare(self, transformer: Any) -> None:
        """Let the time embedding see exact times, and the position embedding exact seconds."""
        embedder = transformer.time_embed
        self.times = ExactTimes(embedder, embedder.emb.time_proj, self.shared_times)
        self._coordinates: Tensor | None = None
        transformer.rope.register_forward_pre_hook(lambda _module, args: self._exact_positions(args))

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
        frames, rows, columns = (int(size) for size in inputs.shape[2:])
        apart = n if self.conditioning.time == "zero" else 0
        times = token_timesteps(sigma, apart, x.shape[1:], self.geometry.patch)
        positions = self._positions(len(x), frames, rows, columns, x.device)
        self._coordinates = positions.get("video_coords")
        with self.times.exactly(times, clean=apart * rows * columns):
            out = module(
                hidden_states=inputs.flatten(2).transpose(1, 2).contiguous().to(dtype),
                timestep=times,
                encoder_hidden_states=text.rows.to(dtype),
                encoder_attention_mask=text.mask,
                return_dict=False,
                **positions,
            )
        v = out[0].transpose(1, 2).unflatten(2, (frames, rows, columns))[:, :, n:]
        return v.float().contiguous()  # the same layout, and so the same sums, for sampler and learner

    def _positions(self, batch: int, frames: int, rows: int, columns: int, device: torch.device) -> dict[str, Any]:
        """Return where the tokens are in seconds and pixels, as the pipeline tells its transformer."""
        temporal, spatial = self.geometry.temporal, self.geometry.spatial
        if not self._shapes.conditioned:
            scale = (temporal / self.fps, spatial, spatial)
            return {"num_frames": frames, "height": rows, "width": columns, "rope_interpolation_scale": scale}
        axes = (torch.arange(size, device=device, dtype=torch.float32) for size in (frames, rows, columns))
        t, h, w = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        # The first latent frame is one frame, each other one `temporal` of them: it begins where the one before ends.
        seconds = (t * temporal + 1 - temporal).clamp(min=0) * (1.0 / self.fps)
        return {"video_coords": torch.stack([seconds, h * spatial, w * spatial]).expand(batch, -1, -1)}

    def _exact_positions(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Undo what mixed precision made of the coordinates, which are the last argument, on their way in."""
        return args if self._coordinates is None else (*args[:-1], self._coordinates)

    @torch.no_grad()
    def encode(self, vae: Any, videos: Tensor) -> Tensor:
        """Encode with an AutoencoderKLLTXVideo and normalise."""
        mean, std = _latent_stats(vae)
        latents = vae.encode(videos.to(vae.dtype)).latent_dist.mode().float()
        return (latents - mean) * vae.config.scaling_factor / std

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode with an AutoencoderKLLTXVideo; one with a time of its own is told that nothing is left to denoise."""
        mean, std = _latent_stats(vae)
        z = (latents.float() * std / vae.config.scaling_factor + mean).to(vae.dtype)
        time = z.new_zeros(len(z)) if vae.config.timestep_conditioning else None
        with _seeded(z.device) if any(vae.config.decoder_inject_noise) else contextlib.nullcontext():
            return vae.decode(z, time, return_dict=False)[0]


def _latent_stats(vae: Any) -> tuple[Tensor, Tensor]:
    mean, std = (stat.float().view(1, -1, 1, 1, 1) for stat in (vae.latents_mean, vae.latents_std))
    return mean, std


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Within it, torch's generators of the CPU and of ``device`` draw from a fixed seed; then they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        yield


FAMILY = LtxFamily
