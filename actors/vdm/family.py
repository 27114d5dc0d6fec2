"""What a family of video models owes: how its text encoder, VAE and transformer are called. ``shapes`` has what it owes a plan.

Responsible for the protocol, and for what most families have in common: reference latents stand before the target's along time
(arXiv 2511.16669, section on the VDM). One that is conditioned in another way says so in ``encode_condition``, ``embed_image`` and
its ``shapes``. Policy, samplers, embedders and learners use nothing else of a family. To add one: a package with ``shapes`` and
``family``, and a row in ``families``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from actors.failures import BadSampleError
from actors.vdm.exact_times import ExactTimes
from actors.vdm.families import Blueprint
from actors.vdm.flow_sde import NUM_TRAIN_TIMESTEPS
from actors.vdm.frames import frames_to_video
from actors.vdm.image_encoder import ImageEncoder
from actors.vdm.settings import ConditioningSection
from actors.vdm.shapes import Geometry
from actors.vdm.text_encoder import CaptionReading, Captions


class Family(ABC):
    """How one pipeline's models are called. It holds none of them: a process hands in those that it has.

    Latents are float32 (C, F, h, w), normalised as the transformer sees them; videos are (B, 3, T, H, W) in -1..1.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    """Layers of each block that an adapter is put into by default."""
    times: ExactTimes
    """Of the transformer that was prepared."""

    def __init__(
        self,
        blueprint: Blueprint,
        *,
        conditioning: ConditioningSection | None = None,
        shared_times: bool = True,
        fps: float = 8.0,
    ) -> None:
        """Read the configurations of ``blueprint``.

        conditioning: what becomes of the input's frames.
        shared_times: whether a clip's two times are embedded once each, not token by token: the same values.
        fps: frames per second of the clips, for transformers whose position embedding counts seconds.
        """
        self.blueprint = blueprint
        self.conditioning = conditioning or ConditioningSection()
        self.shared_times, self.fps = shared_times, fps
        self.geometry: Geometry = blueprint.shapes.geometry

    @property
    def sees_image(self) -> bool:
        """Whether the transformer reads what an image encoder makes of the input, beside latents."""
        return "image_encoder" in self.blueprint.parts

    def reference_latents(self, frames: int) -> int:
        """Return how many latent frames stand before the target's where ``frames`` are shown; BadSampleError: it cannot be done."""
        return self.blueprint.shapes.reference_latents(self.conditioning, frames)

    # --- text -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def reading(self) -> CaptionReading:
        """How the text encoder reads a caption."""

    # --- transformer ------------------------------------------------------------------------------------------------

    @abstractmethod
    def units(self, transformer: Any) -> list[nn.Module]:
        """Return what the transformer is sharded and checkpointed by: its blocks."""

    @abstractmethod
    def prepare(self, transformer: Any) -> None:
        """Set ``times``, hooked into a loaded transformer; once, before it is adapted, copied or sharded."""

    @abstractmethod
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
        """Return v = eps - x0 of the target latents, float32, of x's shape.

        Args:
            module: the transformer; it may be sharded, so that it is called and nothing of it is read but its configuration.
            x: float32 (B, C, F, h, w), the noisy target.
            sigma: float32 (B,), in 0..1.
            text: the captions, or the negative prompt once for each clip.
            references: float32 (B, C, n, h, w), what :meth:`encode_condition` made; None: the caption alone.
            dtype: that the transformer computes in.
            image: float32 (B, tokens, D), what :meth:`embed_image` made; None where the family has no image encoder.
        """

    # --- VAE --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, vae: Any, videos: Tensor) -> Tensor:
        """Encode videos, T = chunk k + 1, to latents (B, C, F, h, w): the mode of the posterior, no noise."""

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode latents (B, C, F, h, w) to videos, in the VAE's dtype. Equal latents give equal videos."""

    def embed_image(self, encoder: ImageEncoder, frames: np.ndarray) -> Tensor:
        """Embed the last of the input's frames uint8 (n, H, W, 3): float32 (tokens, D). Of families with an image encoder."""
        return encoder(frames[-1])

    @torch.no_grad()
    def encode_condition(
        self, vae: Any, frames: np.ndarray, device: torch.device, num_frames: int | None = None
    ) -> Tensor:
        """Encode the input's frames uint8 (n, H, W, 3) to the clean latents (C, n', h, w) that the target is conditioned on.

        Each frame is encoded as a video of its own: a causal VAE drops frames that do not fill a chunk. Or all of them are one
        clip, and ``take`` of its F latent frames are kept, those at floor(linspace(0, F - 1, take)): VANS' released code. The
        call's batch is always one clip's frames, so that the sampler and the learner get equal bits. BadSampleError for a clip of
        which the VAE would drop frames.

        num_frames: of the answer. Only families whose condition is as long as the clip read it.
        """
        if self.conditioning.references == "frames":
            videos = frames_to_video(frames[:, None]).to(device)  # (n, 3, 1, H, W)
            return self.encode(vae, videos)[:, :, 0].transpose(0, 1).contiguous()
        if len(frames) % self.geometry.chunk != 1:
            raise BadSampleError(
                f"an input clip of {len(frames)} frames cannot be encoded: this model's causal VAE takes "
                f"{self.geometry.chunk}k+1"
            )
        latents = self.encode(vae, frames_to_video(frames)[None].to(device))[0]
        picks = torch.linspace(0, latents.shape[1] - 1, self.conditioning.take).long()
        return latents[:, picks.to(device)].contiguous()


def token_timesteps(
    sigma: Tensor, references: int, shape: tuple[int, ...] | torch.Size, patch: tuple[int, int, int]
) -> Tensor:
    """Return the time of each token: 1000 sigma on the target's, 0 on those of the ``references`` leading latent frames.

    sigma: (B,) float32; shape: (C, F, h, w) of the target. Without references the result is (B,), a clip's one time;
    with them (B, tokens), latent frames slowest, then rows.
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
