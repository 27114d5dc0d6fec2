"""The run's three models as architectures, with the sizes that a plan reads again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actors.architectures import Architecture, architecture
from actors.architectures import cost as costs
from actors.vdm.shapes import VdmTokens
from pipeline.config import RunConfig
from pipeline.fleet.models import require_drawable, resolve_model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROMPT_TEXT = 128
"""Assumed tokens of system text, question and chat marks around a video."""
STAMP_TOKENS = 12
"""Assumed tokens with which Qwen3-VL writes the time of each pair of frames."""
CAPTION_TOKENS = 64
"""Assumed tokens of a caption."""


@dataclass(frozen=True)
class Models:
    """Architectures and parameter counts (role, component) → number; ``prompt`` and ``clip_tokens`` are of the run's shapes."""

    vlm: Architecture
    vdm: Architecture
    clip: Architecture
    parameters: Mapping[tuple[str, str], int]
    prompt: costs.VlmTokens
    clip_tokens: VdmTokens


def load_models(config: RunConfig) -> Models:
    """Return the architectures of ``config``'s models. Nothing is downloaded, no weight is read.

    Raises CheckpointError for a model that is neither a folder nor known by name, ConfigError for clips that the artist cannot draw.
    """
    require_drawable(config)
    models = config.models
    vlm, vdm, clip = (
        architecture(resolve_model(name, role), role)  # type: ignore[arg-type]
        for role, name in (("vlm", models.vlm), ("vdm", models.vdm), ("clip", models.clip))
    )
    parameters: dict[tuple[str, str], int] = {
        (model.role, component): model.parameters(component)
        for model in (vlm, vdm, clip)
        for component in model.components
    }
    video = config.video
    vision = vlm.components["model"]
    pairs = -(-video.input_frames // int(vision["vision_config"]["temporal_patch_size"]))
    text = PROMPT_TEXT + (STAMP_TOKENS * pairs if str(vision["model_type"]).startswith("qwen3") else 0)
    return Models(
        vlm,
        vdm,
        clip,
        parameters,
        costs.vlm_tokens(vlm, video.input_frames, *video.vlm_largest, text),
        vdm.shapes.tokens(
            video.num_frames,
            video.height,
            video.width,
            video.reference_latents,
            one_time=video.conditioning.time == "shared",
        ),
    )
