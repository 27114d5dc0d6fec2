"""``training=all_in_one``, whole and real: one step trains both models of the tiny pair, and its checkpoint resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.weights.files import read_weights
from pipeline.checkpoint import CheckpointStore
from pipeline.config import load_config
from pipeline.run.train import run_training

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]


@pytest.mark.timeout(600)
def test_both_models_learn_in_one_stage_and_go_on_from_its_checkpoint(
    ray_local: None, toy_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = load_config(
        "toy",
        [
            f"out={out}",
            "training=all_in_one",
            f"data.train={toy_shards}/train",
            f"data.eval={toy_shards}/test",
            "stage1.steps=2",
            "stage1.rollout={prompts_per_step: 2, group_size: 4}",
            "stage1.text.temperature=1.5",
            "stage2.optim.ema=0.5",
            "pools.vdm.workers=1",
            "learner.ranks=1",
            "checkpoint.every=1",
            "tracking.clips_every=0",
        ],
    )
    report = run_training(config)
    history = report.stages["all_in_one"].history
    assert len(history) == 2
    for metrics in history:
        for policy in ("vlm", "vdm"):
            assert metrics[f"learner/{policy}/applied"] == 1.0
            assert metrics[f"learner/{policy}/ratio_max_dev"] == 0.0
        assert metrics["learner/vlm/entropy"] > 0 and "learner/entropy" not in metrics
    exported = {}
    for policy in ("vlm", "vdm"):
        exported[policy] = read_weights(out / f"{policy}_adapter").tensors
        moved = [name for name, value in exported[policy].items() if "lora_B" in name and np.abs(value).max() > 0]
        assert moved  # an adapter starts with lora_B = 0

    store = CheckpointStore(out / "checkpoints")
    newest, first = store.paths("all_in_one")
    newest.rename(tmp_path / newest.name)  # as if the run had been killed behind its first step
    assert first.name.endswith("step000001")
    again = run_training(config, resume=True)
    (repeated,) = again.stages["all_in_one"].history
    for name, value in repeated.items():
        if name.startswith(("reward/", "learner/", "rollout/", "advantage/", "sde/")):
            assert value == pytest.approx(history[1][name], rel=1e-4, abs=1e-5), name
    for policy, tensors in exported.items():
        resumed = read_weights(out / f"{policy}_adapter").tensors
        assert tensors.keys() == resumed.keys()
        assert all(np.allclose(resumed[name], value, atol=1e-5) for name, value in tensors.items())
