"""The bundled runs of the paper are the release's experiment: what the authors' clone says, but for its texts."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.config.load import BUNDLED, parse_config
from pipeline.config.yaml12 import parse_yaml
from pipeline.release.clone import BY_CODE, ROWS, Lora, Release
from pipeline.release.run_file import KEYS, run_values, written

RUNS = sorted(path.stem for path in BUNDLED.glob("vans_*.yaml"))
TEXTS = {"models.prompt.system", "models.negative_prompt"}
"""Other people's sentences: the bundled runs have words of their own."""
WHOLE_FRAMES = {"video.vae_tiling", "video.vae_tile", "video.vae_stride"}
"""A GPU of 80 GB decodes them whole."""
_GUIDANCE = {f"{stage}.render.guidance" for stage in ("stage1", "stage2", "evaluate")}
OWN: dict[str, set[str]] = {
    # Another patch, the same number of tokens; time is written out, so that it should be true.
    "vans_qwen3vl": {"video.vlm_pixels", "video.vlm_multiple", "video.vlm_fps"},
    "vans_ltx": {
        "models.flow_shift",
        "video.fps",
        "video.conditioning.references",
        "video.conditioning.time",
        *_GUIDANCE,
    },
    "vans_wan22": {"video.fps", "video.conditioning.time"},
    "vans_wan_i2v": {
        "models.flow_shift",
        "video.fps",
        "video.num_frames",
        "video.conditioning.references",
    },
}
"""What other models bring with them."""


def february() -> Release:
    """What the authors' clone of February 2026 says, with texts of our own in the place of theirs."""
    values = {name: row.was for name, row in ROWS.items()}
    values |= {"system": "say [Think][/Think] and [Ans][/Ans]", "negative_prompt": "a blur"}
    lora = ROWS["lora"].was
    return Release(values, Lora(lora["r"], lora["lora_alpha"], tuple(lora["target_modules"])), "[Think]", "[Ans]", ())


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = getattr(values, part)
    return values


@pytest.mark.parametrize("name", RUNS)
def test_a_bundled_run_is_what_the_release_does(name: str) -> None:
    run = load_config(name)
    imported = run_values(february(), {}, "toy", "x")
    told = parse_config({key: value for key, value in imported.items() if key != "base"})
    apart = {key for key in (*KEYS, *BY_CODE) if at(run, key) != at(told, key)}
    assert apart == TEXTS | WHOLE_FRAMES | OWN.get(name, set())
    if name == "vans_qwen3vl":
        unit = run.video.vlm_multiple**2
        assert run.video.vlm_pixels == tuple(pixels // 28**2 * unit for pixels in at(told, "video.vlm_pixels"))
    assert run.models.prompt.think_tag in run.models.prompt.system_text
    assert run.models.negative_prompt


def test_the_yaml_is_read_back_as_it_was() -> None:
    values = run_values(february(), {"vlm": "/a b", "vlm_adapter": "/c: d", "vdm": "/e"}, "vans_1gpu", "mine")
    assert parse_yaml(written(values), "here") == values
    assert values["models"]["prompt"]["think_tag"] == "[Think]" and values["stage1"]["grpo"] == {"kl_beta": 0.0}
    assert "grpo" not in run_values(february(), {"vlm": "/a", "vdm": "/e"}, "toy", "x")["stage1"]
