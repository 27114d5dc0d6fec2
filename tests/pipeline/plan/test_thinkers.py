"""A plan for a thinker that no formula knows: parameters from the meta device, tokens from its own processor, and said to be so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.architectures import architecture, cost
from actors.architectures.thinker import sizes
from actors.policy.settings import LoraSection
from actors.records import VideoQuestion
from actors.vlm.policy import VlmPolicy
from actors.vlm.prompt import render_prompt
from cluster.hardware import parse_gpus, rates_of
from pipeline.config.load import parse_config
from pipeline.plan import load_models, make_plan
from pipeline.plan.models import PROMPT_TEXT, prompt_tokens
from tests.actors.vlm.thinkers import build_tiny_glm4v, build_tiny_internvl

BUILDERS = {"internvl": build_tiny_internvl, "glm4v": build_tiny_glm4v}


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("thinkers") / request.param)


def test_sizes_are_those_of_the_weights(folder: Path) -> None:
    policy, found = VlmPolicy.load(folder, lora=LoraSection(rank=4, alpha=8.0)), architecture(folder, "vlm")
    named: list[tuple[str, Any]] = [(n, p) for n, p in policy.module.named_parameters() if "lora_" not in n]
    language = sum(p.numel() for n, p in named if "language_model" in n or n.startswith("lm_head"))
    adapter = sum(p.numel() for n, p in policy.module.named_parameters() if "lora_" in n)
    assert found.parameters("model") == sum(p.numel() for _, p in named)
    assert (sizes(found).language, sizes(found).vision) == (language, found.parameters("model") - language)
    assert cost.lora_parameters(found, 4) == adapter and cost.rough(found) == ("vision tower",)
    tokens = cost.VlmTokens((2, 3, 4), 6, 10)
    assert cost.vision_flops(found, tokens).total == 2 * sizes(found).vision * 24


def test_the_tokens_of_a_video_are_its_processors(folder: Path) -> None:
    policy, frames = VlmPolicy.load(folder), 6
    found = prompt_tokens(architecture(folder, "vlm"), frames, 32, 64)
    asked = VideoQuestion("?", np.zeros((frames, 32, 64, 3), np.uint8), 1.0)
    (encoded,) = policy._prompts.encode([asked])
    wording = len(policy.processor.tokenizer(render_prompt(policy.processor, "?"))["input_ids"])
    stamps = found.text - PROMPT_TEXT
    pixels = next(v for k, v in encoded.visual.items() if k.startswith("pixel_values"))
    assert found.patches * 3 * 8 * 8 * (2 if folder.name == "glm4v" else 1) == pixels.numel()
    real = len(encoded.input_ids) - wording
    if folder.name == "internvl":
        assert stamps == 0 and abs(found.video - real) <= 2
    else:
        assert (
            found.video == int((encoded.input_ids == policy.processor.image_token_id).sum())
            and real <= found.video + stamps
        )


def test_a_run_with_such_a_thinker_has_a_plan_that_says_so(folder: Path) -> None:
    config = parse_config({"models": {"vlm": str(folder)}, "pools": {"vlm": {"gpus": 0.2}}, "learner": {"gpus": 0.2}})
    hardware = parse_gpus("1x80")
    found = make_plan(config, hardware, rates_of(hardware), load_models(config))
    assert any("the thinker's vision tower: two operations for each parameter" in line for line in found.assumptions)
    think = next(d for d in found.stages[0].demands if d.name == "think")
    assert 0 < think.unit_s < 1


def test_qwens_are_by_formula() -> None:
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"):
        assert cost.rough(architecture(name, "vlm")) == ()
