"""How a caption about a sample becomes a request to the VDM pool; the same for training, evaluation and answers."""

from __future__ import annotations

from actors.records import RenderRequest, Sample, SdeSpec
from actors.vdm.conditioning import select_reference_frames
from pipeline.config.schema import RunConfig
from pipeline.config.stages import RenderSection


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
) -> RenderRequest:
    """Return the request that draws ``caption`` in the scene of ``sample``."""
    return RenderRequest(
        sample_id=sample.id,
        index=index,
        caption=caption,
        reference_frames=select_reference_frames(sample.context, config.video.reference_frames),
        num_frames=config.video.num_frames,
        steps=render.steps,
        guidance=render.guidance,
        noise_seed=noise_seed,
        sde_seed=sde_seed,
        sde=sde,
    )
