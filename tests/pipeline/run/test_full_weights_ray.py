"""Both stages with ``lora.rank: 0``, whole and real: full weights are published, exported, handed over, resumed and evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.records import derive_seed
from actors.weights.files import read_weights
from pipeline.config import load_config
from pipeline.evaluate.predictions import Prediction
from pipeline.fleet.models import Role, resolve_model
from pipeline.run.train import SYSTEMS, run_training
from pipeline.stages.requests import render_request

ROLES: tuple[Role, ...] = ("vlm", "vdm")

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]


def same(one: list[Prediction], other: list[Prediction]) -> bool:
    """Whether the texts are equal and the clips are equal but for a level: batches of other sizes round otherwise."""
    return [p.text for p in one] == [p.text for p in other] and all(close(a, b) for a, b in zip(one, other))


def close(a: Prediction, b: Prediction) -> bool:
    if a.frames is None or b.frames is None:
        return a.frames is b.frames
    return int(np.abs(a.frames.astype(int) - b.frames.astype(int)).max()) <= 1


@pytest.mark.timeout(600)
def test_full_weights_go_from_stage_to_stage_and_into_the_evaluation(
    ray_local: None, toy_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    overrides = [f"out={out}", f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test"]
    for stage in ("stage1", "stage2"):
        overrides += [f"{stage}.steps=1", f"{stage}.lora.rank=0", f"{stage}.rollout.prompts_per_step=2"]
        overrides += [f"{stage}.rollout.group_size=4", f"{stage}.optim.lr=2.0e-3"]
    overrides += ["stage2.anchor_min_rouge=0", "stage1.text.temperature=1.5", "pools.vdm.workers=1"]
    overrides += ["evaluate.samples=4", "evaluate.render.steps=2", "tracking.clips_every=0"]
    config = load_config("toy", overrides)

    report = run_training(config, evaluate=True)
    assert [s.history[0]["learner/applied"] for s in report.stages.values()] == [1.0, 1.0]
    assert all(stage.frozen_ok and stage.ratio_max_dev == 0.0 for stage in report.stages.values())
    assert report.stages["stage2"].history[0]["pool/vlm/version"] == 1.0  # the tuned thinker, while the artist learns
    assert {p.name for p in out.glob("v*")} == {"vlm_model", "vdm_model"}
    for role in ROLES:
        tuned, base = (read_weights(folder) for folder in (out / f"{role}_model", resolve_model("tiny", role)))
        assert tuned.kind == base.kind == "full" and tuned.tensors.keys() == base.tensors.keys()
        assert any(not np.array_equal(tuned.tensors[name], base.tensors[name]) for name in tuned.tensors)

    before, after = (report.predictions[system] for system in SYSTEMS)
    assert not same(before, after)
    from actors.vdm.policy import VdmPolicy  # what the pool drew is what the exported folder draws
    from actors.vdm.sampling import sample as draw

    torch.set_num_threads(1)
    artist = VdmPolicy.load(out / "vdm_model", shift=config.models.flow_shift)
    sample, prediction = next(
        (s, p) for s, p in zip(report.samples, report.predictions[SYSTEMS[1]], strict=True) if p.frames is not None
    )
    noise = derive_seed(config.evaluate.seed, sample.id, "noise")
    request = render_request(config, sample, prediction.caption, 0, config.evaluate.render, noise_seed=noise)
    drawn = draw(artist, [request])[0].frames.astype(int)
    assert np.abs(drawn - prediction.frames.astype(int)).max() <= 1

    # Resumed behind stage 1: the pools start from the base, and are given what the folders hold.
    again = run_training(config, resume=True, evaluate=True)
    assert again.stages.keys() == {"stage2"}
    assert all(same(again.predictions[system], answers) for system, answers in zip(SYSTEMS, (before, after)))
