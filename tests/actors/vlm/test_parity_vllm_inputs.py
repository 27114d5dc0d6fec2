"""Prompts against vLLM's own processor and its model's own positions: every length, many rates, every dtype of the engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from vllm_inputs import VllmInputs

from actors.records import VideoQuestion
from actors.vlm.inputs import PromptEncoder
from actors.vlm.policy import VlmPolicy
from actors.vlm.positions import time_interval

pytestmark = pytest.mark.slow

RATES = (0.05, 0.5, 1.2, 2.5, 8.0, 23.976, 29.97, 60.0)
FOLDERS = {"qwen2.5-vl": "tiny_qwen25_dir", "qwen3-vl": "tiny_vlm_dir"}


def questions(seed: int) -> Iterator[VideoQuestion]:
    """Every number of frames from 2 to 64: each at one of ``RATES``, and spread over some duration up to a minute."""
    rng = np.random.default_rng(seed)
    for count in range(2, 65):
        rates = [RATES[count % len(RATES)], float(f"{(count - 1) / rng.uniform(0.3, 60):.6g}")]
        frames = np.zeros((count, 16, 16, 3), np.uint8)
        for rate in [*rates, 1.2] if count == 16 else rates:
            yield VideoQuestion("what comes next?", frames, rate)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("qwen2.5-vl", dtype) for dtype in ("float32", "bfloat16", "float16")), ("qwen3-vl", "bfloat16")],
)
def test_tokens_and_positions_are_vllms(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(FOLDERS[name])
    engine, config = VllmInputs(folder, dtype), AutoConfig.from_pretrained(folder)
    encoder = PromptEncoder(engine.ours, config, cache_size=1, engine_dtype=dtype)
    exact = PromptEncoder(engine.ours, config, cache_size=1)
    otherwise = 0
    for asked in questions(seed=1):
        tokens, positions, _ = engine(asked)
        (encoded,), (other,) = encoder.encode([asked]), exact.encode([asked])
        where = f"{len(asked.frames)} frames at {asked.fps}"
        assert encoded.input_ids.tolist() == tokens, where
        assert np.array_equal(encoded.positions.numpy(), positions), where
        assert encoded.next_position == positions.max() + 1, where
        otherwise += not torch.equal(other.positions, encoded.positions)
    # Rounding is seen, and where: only Qwen2.5-VL has positions in seconds, and float32 is what `exact` assumes.
    assert (otherwise > 10) == (name == "qwen2.5-vl" and dtype != "float32")


def test_float32_is_rounded_too() -> None:
    """16 frames at 1.2 a second and 2 positions a second, as Qwen2.5-VL has: steps 3 and 6 are at 9 and 19.

    In double precision they are at 10 and 20, but vLLM holds float32, where 5/3 is a little less.
    """
    interval = time_interval(2 / 1.2, 2, torch.float32)
    assert [int(step * interval) for step in (3, 6)] == [9, 19]
    assert [int(step * 2 / 1.2 * 2) for step in (3, 6)] == [10, 20]


def test_the_engines_dtype_decides_whatever_the_policy_computes_in(tiny_qwen25_dir: Path) -> None:
    asked = VideoQuestion("what comes next?", np.zeros((64, 16, 16, 3), np.uint8), 1.1)
    _, served, _ = VllmInputs(tiny_qwen25_dir, "bfloat16")(asked)
    for dtype in ("float32", "bfloat16"):
        policy = VlmPolicy.load(tiny_qwen25_dir, dtype=dtype, engine_dtype="bfloat16")
        (encoded,) = policy._prompts.encode([asked])
        assert np.array_equal(encoded.positions.numpy(), served)
    (float32,) = VlmPolicy.load(tiny_qwen25_dir)._prompts.encode([asked])
    assert not np.array_equal(float32.positions.numpy(), served)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_samples_frames_drops_none(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = shutil.copytree(request.getfixturevalue(FOLDERS[name]), tmp_path / "model")
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["video_processor"] |= {"do_sample_frames": True, "fps": 2.0}
    file.write_text(json.dumps(settings))
    engine = VllmInputs(folder, "float32")
    encoder = PromptEncoder(engine.ours, AutoConfig.from_pretrained(folder))
    video = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    for rate in (0.5, 8.0, 30.0):
        asked = VideoQuestion("what comes next?", video, rate)
        tokens, positions, pixels = engine(asked)
        (encoded,) = encoder.encode([asked])
        assert encoded.visual["video_grid_thw"][0, 0] == 8, "two frames make one step"
        assert encoded.input_ids.tolist() == tokens and np.array_equal(encoded.positions.numpy(), positions)
        assert np.allclose(encoded.visual["pixel_values_videos"].numpy(), pixels, atol=1e-6)
