"""A whole run in Chinese: questions, answers, rewards, table and contact sheet."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.data.toy.language import language_in
from pipeline.data.toy.shards import write_toy
from pipeline.run.train import run_training
from pipeline.stages.loop import StepReport

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]


@pytest.mark.timeout(600)
def test_a_run_in_chinese_learns_from_chinese_answers_and_is_judged_by_them(ray_local: None, tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", train=16, test=8, language="zh")
    told: dict[str, list[str]] = {"stage1": [], "stage2": []}
    rewards: list[float] = []

    def see(stage: str, report: StepReport) -> None:
        told[stage].extend(m.clip.caption for g in report.batch.groups for m in g.members if m.clip is not None)
        rewards.append(report.metrics.get("reward/rouge_l", 1.0))

    config = load_config(
        "toy",
        [
            f"out={tmp_path / 'run'}",
            *(f"data.{key}={tmp_path}/toy/{split}" for key, split in (("train", "train"), ("eval", "test"))),
            "stage1={steps: 2, rollout: {prompts_per_step: 2, group_size: 4}}",
            "stage2={steps: 1, rollout: {prompts_per_step: 1, group_size: 4}, anchor_min_rouge: 0.1}",
            "evaluate.samples=8",
        ],
    )
    report = run_training(config, evaluate=True, on_step=see)
    for stage, captions in told.items():
        assert captions and sum(language_in(text) == "zh" for text in captions) > len(captions) / 2, stage
    assert all(0.1 < value <= 1 for value in rewards)  # compared letter by letter
    assert report.table is not None
    table = report.table.markdown()
    assert "ROUGE-L" in table and "Joint-GRPO" in table
