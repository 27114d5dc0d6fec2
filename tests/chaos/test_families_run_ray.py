"""Whole runs with artists that are not Wan 2.1's text to video, of random weights: SFT, then both stages, then the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from pipeline.config import load_config
from pipeline.run.train import run_training
from pipeline.sft import run_sft
from pipeline.sft.settings import sft_settings
from tests.actors.vdm.pipelines import GIVEN, build

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", params=["ltx condition", "wan i2v"])
def member(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def video(member: str) -> list[str]:
    """What a run says of the clips of such an artist."""
    given = GIVEN.get(member)
    return [f"video.reference_frames={given}", f"video.num_frames={9 - given}"] if given else []


@pytest.fixture(scope="module")
def tuned(
    ray_alone: None, member: str, video: list[str], toy_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The artist after two supervised steps, its captions embedded before them and its encoder gone."""
    folder = tmp_path_factory.mktemp("tuned")
    source, out = build(member, folder / "random"), folder / "sft"
    settings = sft_settings(load_config("toy", [*video, "sft.vdm={steps: 2, batch: 4}"]), "vdm")
    result = run_sft("vdm", source, toy_shards / "train", out, settings)
    assert result.steps == 2 and list(out.glob("captions/*/*.safetensors"))
    return out


def test_both_stages_learn_and_what_they_export_loads(
    tuned: Path, video: list[str], toy_shards: Path, tmp_path: Path
) -> None:
    config = load_config(
        "toy",
        [
            *video,
            "name=other",
            f"out={tmp_path / 'run'}",
            f"data.train={toy_shards}/train",
            f"data.eval={toy_shards}/test",
            f"models.vdm={tuned}",
            "stage1.steps=1",
            "stage2.steps=2",
            "stage1.rollout={prompts_per_step: 2, group_size: 4}",
            "stage2.rollout={prompts_per_step: 2, group_size: 4}",
            "stage2.anchor_min_rouge=0.1",
            "pools.embed.workers=1",
            "learner.ranks=2",
            "evaluate.samples=4",
        ],
    )
    report = run_training(config, evaluate=True)
    assert list(report.stages) == ["stage1", "stage2"]
    for stage in report.stages.values():
        assert stage.frozen_ok and stage.ratio_max_dev == 0.0
    assert [m["learner/applied"] for m in report.stages["stage2"].history] == [1.0, 1.0]
    pipe = DiffusionPipeline.from_pretrained(tuned)
    pipe.load_lora_weights(str(config.out / "vdm_adapter"), weight_name="pytorch_lora_weights.safetensors")
