"""How a caption about a sample becomes a request to the VDM pool; the same for training, evaluation and answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from actors.records import Clip, RenderRequest, Sample, SdeSpec
from actors.vdm.frames import conditioning_frames
from pipeline.config.schema import RunConfig, VideoSection
from pipeline.config.stages import RenderSection

if TYPE_CHECKING:  # `vans answer` draws without pools
    from pipeline.fleet.open import Fleet


def artist_frames(video: VideoSection, sample: Sample) -> np.ndarray:
    """Return the frames of ``sample``'s input that the artist is conditioned on, uint8 (n, H, W, 3)."""
    return conditioning_frames(sample.context, video.reference_frames, video.conditioning)


def render_request(
    config: RunConfig,
    sample: Sample,
    caption: str,
    index: int,
    render: RenderSection,
    *,
    noise_seed: int,
    sde: SdeSpec | None = None,
    sde_seed: int = 0,
    ends: bool = False,
) -> RenderRequest:
    """Return the request that draws ``caption`` in the scene of ``sample``."""
    return RenderRequest(
        sample_id=sample.id,
        index=index,
        caption=caption,
        reference_frames=artist_frames(config.video, sample),
        num_frames=config.video.num_frames,
        steps=render.steps,
        guidance=render.guidance,
        noise_seed=noise_seed,
        sde_seed=sde_seed,
        sde=sde,
        ends=ends,
    )


async def render(fleet: Fleet, request: RenderRequest) -> Clip:
    """Return the clip of ``request``; with an embed pool, what it is conditioned on is asked for first, and goes along."""
    if fleet.conditions is None:
        clip: Clip = await fleet.vdm.submit(request)
        return clip
    request = replace(request, condition=await fleet.conditions.of(request))
    clip = await fleet.vdm.submit(request)
    return clip if clip.trajectory is None else replace(clip, condition=request.condition)
