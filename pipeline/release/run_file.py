"""The YAML of a released pair: its prompt, frames, conditioning, schedule, guidance and decoding over a bundled run's placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.load import merge
from pipeline.config.yaml12 import dump_yaml
from pipeline.release.clone import BY_CODE, REPOSITORY, Release

KEYS: Mapping[str, str] = {
    "models.prompt.system": "system",
    "models.prompt.think_tag": "think_tag",
    "models.prompt.answer_tag": "answer_tag",
    "models.negative_prompt": "negative_prompt",
    "models.flow_shift": "shift",
    "models.flow_grid": "grid",
    "video.num_frames": "num_frames",
    "video.height": "height",
    "video.width": "width",
    "video.fps": "fps",
    "video.input_frames": "frames_seen",
    "video.vlm_pixels": "pixels",
    "video.vlm_multiple": "multiple",
    "video.conditioning.take": "take",
    "video.vae_tiling": "tiled",
    "video.vae_tile": "tile_pixels",
    "video.vae_stride": "stride_pixels",
    "stage1.text.max_tokens": "rollout_tokens",
    "stage1.render.guidance": "guidance",
    "stage1.lora.rank": "rank",
    "stage1.lora.alpha": "alpha",
    "stage2.text.temperature": "temperature",
    "stage2.text.top_p": "top_p",
    "stage2.text.max_tokens": "rollout_tokens",
    "stage2.render.guidance": "guidance",
    "evaluate.text.temperature": "temperature",
    "evaluate.text.top_p": "top_p",
    "evaluate.text.max_tokens": "answer_tokens",
    "evaluate.render.steps": "steps",
    "evaluate.render.guidance": "guidance",
}
"""Key of a run → the value of the clone that it takes: a row of ``clone.ROWS``, or what is made of one (:data:`_MADE_OF`)."""

_MADE_OF = {
    "think_tag": "system",
    "answer_tag": "system",
    "rank": "lora",
    "alpha": "lora",
    "pixels": "most_pixels",
    "grid": "extra_step",
    "tile_pixels": "tile",
    "stride_pixels": "stride",
}
LATENT = 8
"""Pixels of a side of Wan 2.1's latents, in which the release counts its tiles."""


def _values(release: Release) -> dict[str, Any]:
    """Return the clone's values by the names that :data:`KEYS` uses."""
    read = release.values
    even = read["extra_step"] and read["sigma_min"] == 0
    return {
        **read,
        "think_tag": release.think_tag,
        "answer_tag": release.answer_tag,
        "rank": release.lora.rank,
        "alpha": release.lora.alpha,
        "pixels": [read["least_pixels"], read["most_pixels"]],
        "grid": "even" if even else "diffusers",
        "tile_pixels": [LATENT * side for side in read["tile"]],
        "stride_pixels": [LATENT * side for side in read["stride"]],
    }


def run_values(release: Release, models: Mapping[str, str], base: str, name: str) -> dict[str, Any]:
    """Return what the YAML says. ``models`` are the keys of section models that name a folder; ``base`` is a bundled run."""
    read = _values(release)
    run: dict[str, Any] = {"base": base, "name": name, "out": f"runs/{name}", "models": dict(models)}
    for key, value in [
        *((key, read[source]) for key, source in KEYS.items()),
        *((key, value) for key, (value, _) in BY_CODE.items()),
    ]:
        run = _with(run, key, value)
    if "vlm_adapter" in models:
        # The reference of stage 1 is the model without its adapter: here the one before any tuning, which is none.
        run = _with(run, "stage1.grpo.kl_beta", 0.0)
    return run


def origins(release: Release) -> dict[str, str]:
    """Return where the value of each key is from: the clone's file and the name in it."""
    read = {key: release.where(_MADE_OF.get(name, name)) for key, name in KEYS.items()}
    return read | {key: where for key, (_, where) in BY_CODE.items()}


def written(values: Mapping[str, Any]) -> str:
    """Return the YAML's text."""
    head = (
        f"# VANS as released ({REPOSITORY}), written by `vans import-release`: docs/vans.md says how to use it.\n"
        "# What is not here (pools, learner, steps, rewards) is the base's; another placement is another base.\n"
    )
    return head + dump_yaml(dict(values))


def _with(run: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return merge(run, value)
