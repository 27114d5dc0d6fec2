"""Operations of a unit of a run's work: a thinker's answers, a clip, an experience of a learner. Pure.

A plan divides them by assumed rates, and a run's speeds divide them by the seconds that they took.
"""

from __future__ import annotations

from typing import Literal

from actors.flops import Flops
from actors.vdm.shapes import Shapes, VdmTokens
from pipeline.config import RunConfig

CAPTION_TOKENS = 64
"""Assumed tokens of a caption."""


def experience_flops(
    config: RunConfig, policy: Literal["vlm", "vdm"], forward: Flops, *, recomputed: bool = True
) -> float:
    """Return the operations of learning from one experience, whose ``forward`` reads it once, over all epochs of its batch.

    ``recomputed``: with activations that are computed a second time, where the learner does so.
    """
    learner, stage = config.learner, config.stage1 if policy == "vlm" else config.stage2
    objective = stage.learning
    again = forward.update(
        lora=stage.lora.rank > 0,
        checkpointing=recomputed and learner.activation_checkpointing,
        kl=objective.kl_beta > 0,
        old_pass=False,
    )
    return (again.total + forward.total * objective.forwards()) * objective.epochs_per_batch


def trajectory_forward(config: RunConfig, shapes: Shapes, tokens: VdmTokens) -> Flops:
    """Return a learner's forward over one clip: one for each step of the window, or one where the clip is noised anew."""
    stage = config.stage2
    passes = 1  # of a forward-process objective: one noise level, without guidance
    if stage.learning.samples == "steps":
        passes = stage.sde.window_size * branches(stage.render.guidance)
    return shapes.transformer_flops(tokens) * passes


def branches(guidance: float) -> int:
    """Return the passes of the transformer for one denoising step of one clip."""
    return 2 if guidance > 1 else 1


def clip_tokens(config: RunConfig, shapes: Shapes) -> VdmTokens:
    """Return the transformer's tokens of one of the run's clips."""
    video = config.video
    return shapes.tokens(
        video.num_frames,
        video.height,
        video.width,
        shapes.reference_latents(video.conditioning, video.reference_frames),
        one_time=video.conditioning.time == "shared",
    )


def frames_flops(config: RunConfig, shapes: Shapes) -> tuple[float, float]:
    """Return the operations of decoding one of the run's clips, and of encoding what one is conditioned on."""
    video = config.video
    size = (video.num_frames, video.height, video.width)
    decode = shapes.decode_flops(*size).total
    return decode, shapes.condition_flops(video.conditioning, video.reference_frames, *size).total
