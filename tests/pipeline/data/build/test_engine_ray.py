"""vLLM within the cluster through ``ray.data.llm``: the toy thinker's nonsense ends, all of it, as counted rejections."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline
from cluster.errors import DataError
from pipeline.config.load import parse_section
from pipeline.data.build.funnel import read_funnel
from pipeline.data.build.recipe import Recipe
from pipeline.data.build.run import build_dataset
from tests.pipeline.data.build.stages import write_videos

pytestmark = [pytest.mark.chaos, pytest.mark.vllm, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(1200)]
THINKER = Path(pipeline.__file__).parent / "assets" / "tiny" / "vlm"
ARGUMENTS = {
    "max_model_len": 4096,
    "dtype": "float32",
    "kv_cache_memory_bytes": 256 << 20,
    "limit_mm_per_prompt": {"image": 4, "video": 0},
    "skip_mm_profiling": True,
}


def test_nonsense_is_counted(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos", 3)
    stage = {"use": "tests.pipeline.data.build.stages:Pieces", "cpus": 0.1}
    model = {
        "model": str(THINKER),
        "frames": 2,
        "frame_side": 32,
        "max_tokens": 16,
        "structured": "prompt",
        "engine": {"arguments": ARGUMENTS, "batch": 8},
    }
    values = {
        "sources": {"videos": tmp_path / "videos"},
        "models": {"thinker": model},
        "stages": {"pieces": stage, "describe": {"model": "thinker", "cpus": 0.1}},
    }
    with pytest.raises(DataError, match="no row came out of 3 videos"):
        build_dataset(parse_section(Recipe, values, "test"), tmp_path / "out", quiet=True)
    funnel = read_funnel(tmp_path / "out")
    assert funnel is not None
    [lost] = [passage for passage in funnel.passages if passage.stage == "describe"]
    assert (lost.what, lost.entered, lost.passed) == ("clip", 9, 0)
    assert set(lost.lost) <= {"not JSON", "truncated", "wrong form", "empty"}
