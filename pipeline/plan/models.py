"""The run's three models as architectures, with the sizes that a plan reads again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from actors.architectures import Architecture, architecture
from actors.architectures import cost as costs
from actors.records import VideoQuestion
from actors.scoring.model import load_model
from actors.vdm.shapes import VdmTokens
from pipeline.config import RunConfig
from pipeline.fleet.kinds import kinds_of
from pipeline.fleet.models import require_drawable, resolve_model
from pipeline.fleet.rewards import reward_models
from pipeline.plan.work import clip_tokens

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROMPT_TEXT = 128
"""Assumed tokens of system text, question and chat marks around a video."""
STAMP_TOKENS = 12
"""Assumed tokens with which a thinker writes the time of each pair of frames, where time is not in its positions."""


@dataclass(frozen=True)
class Models:
    """Architectures and parameter counts (role, component) → number; ``prompt`` and ``clip_tokens`` are of the run's shapes."""

    vlm: Architecture
    vdm: Architecture
    clip: Architecture
    parameters: Mapping[tuple[str, str], int]
    prompt: costs.VlmTokens
    clip_tokens: VdmTokens
    judges: Mapping[str, int | str] = field(default_factory=dict)
    """Parameters of each reward with a model, by its pool; or why they are not known."""


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
    return Models(
        vlm,
        vdm,
        clip,
        parameters,
        prompt_tokens(vlm, video.input_frames, *video.vlm_largest),
        clip_tokens(config, vdm.shapes),
        judge_parameters(config),
    )


def score_of(pool: str) -> str:
    """Return the name of the demand on the pool of a reward with a model."""
    return f"score {pool}"


def judge_parameters(config: RunConfig) -> dict[str, int | str]:
    """Return the parameters of each reward with a model, as its class says before it loads any; or why that is not known.

    The class is imported here. One with an environment of its own may not be importable, which is no error.
    """
    found: dict[str, int | str] = {}
    for pool in reward_models(config):
        arguments = kinds_of(config)[pool].arguments(config)
        try:
            count = load_model(arguments["path"], arguments["options"]).parameters()
        except Exception as error:  # noqa: BLE001 - a user's code; told among the plan's assumptions
            found[pool] = f"{type(error).__name__}: {error}"
        else:
            found[pool] = f"{arguments['path']} does not say its parameters()" if count is None else int(count)
    return found


def prompt_tokens(vlm: Architecture, frames: int, height: int, width: int) -> costs.VlmTokens:
    """Return the tokens of a prompt about ``frames`` frames of height x width.

    Where they do not follow from the size, the processor in the model's folder is asked. Raises CheckpointError without one.
    """
    vision = vlm.components["model"]["vision_config"]
    if costs.has_grid(vlm):
        pairs = -(-frames // int(vision["temporal_patch_size"]))
        stamps = 0 if "tokens_per_second" in vision else STAMP_TOKENS * pairs
        return costs.vlm_tokens(vlm, frames, height, width, PROMPT_TEXT + stamps)
    from actors.vlm.inputs import PromptEncoder
    from actors.vlm.loading import load_config, load_processor

    encoder = PromptEncoder(load_processor(vlm.name), load_config(vlm.name))
    blank = np.zeros((frames + 2, height, width, 3), np.uint8)
    longer, shown = encoder.encode([VideoQuestion("?", clip, 1.0) for clip in (blank, blank[2:])])
    each = (len(longer.input_ids) - len(shown.input_ids)) / 2  # with what is written beside a frame's features
    side = vision.get("patch_size", 14)
    patch = int(side[0] if isinstance(side, list | tuple) else side)
    pixels = sum(v.numel() for name, v in shown.visual.items() if name.startswith("pixel_values")) // 3
    patches = max(1, pixels // patch**2 // frames)
    return costs.VlmTokens((frames, 1, patches), round(each * frames), PROMPT_TEXT)
