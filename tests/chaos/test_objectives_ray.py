"""Stage 2 by each of its ways to learn, with pools and two ranks: a run that lost its last step ends bitwise as it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.weights.files import read_weights
from pipeline.checkpoint import CheckpointStore
from pipeline.run.train import run_training
from tests.actors.learner.objectives.ways import ARTISTS, WAYS, asked

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ARTISTS)
def test_a_run_that_lost_its_last_step_ends_bitwise_the_same(
    ray_local: None, toy_shards: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    config = WAYS[name].config(
        f"out={out}",
        f"data.train={toy_shards}/train",
        f"data.eval={toy_shards}/test",
        "stage1.steps=0",
        "stage2.anchor=truth",
        "stage2.steps=2",
        "stage2.rollout={prompts_per_step: 2, group_size: 3}",
        "checkpoint.every=1",
        "tracking.clips_every=0",
        *asked(name, "resume"),
    )
    first = run_training(config).stages["stage2"].history
    exported = read_weights(out / "vdm_adapter").tensors
    assert len(first) == 2 and all(metrics["learner/applied"] >= 1.0 for metrics in first)
    assert any(np.abs(value).max() > 0 for key, value in exported.items() if "lora_B" in key)

    newest, before = CheckpointStore(out / "checkpoints").paths("stage2")
    newest.rename(tmp_path / newest.name)
    assert before.name.endswith("step000001")
    (repeated,) = run_training(config, resume=True).stages["stage2"].history
    for metric, value in first[1].items():
        if metric.startswith(("reward/", "learner/", "rollout/", "advantage/", "sde/")) and "restarts" not in metric:
            assert repeated[metric] == value or (np.isnan(value) and np.isnan(repeated[metric])), metric
    again = read_weights(out / "vdm_adapter").tensors
    assert exported.keys() == again.keys()
    for key, value in exported.items():
        assert np.array_equal(again[key], value), key
