"""Supervised fine-tuning on Ray Train: the loss falls, and what is exported is an ordinary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from actors.learner.settings import LearnerSection
from actors.records import VideoQuestion
from actors.vdm.policy import VdmPolicy
from actors.vdm.text_encoder import CaptionEmbedder
from actors.vlm.policy import VlmPolicy
from cluster.errors import ConfigError, DataError, PlacementError
from pipeline.cli import app
from pipeline.config.training import SftModelSection, SftOptimSection
from pipeline.sft import SftSettings, run_sft
from pipeline.sft.captions import StoredCaptions, distinct_captions
from pipeline.sft.command import run_tracked_sft
from pipeline.sft.finetuning import prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
OPTIM = SftOptimSection(lr=3e-3, warmup_steps=2)
TUNING = SftModelSection(steps=30, batch=8, optim=OPTIM, log_every=5, checkpoint_every=0)
ONE_RANK = LearnerSection(ranks=1, cpus=0.5, placement="PACK")


def test_vlm_sft_lowers_the_loss_and_exports_a_model_that_has_it(
    toy_shards: Path, tiny_vlm_dir: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    out = tmp_path / "sft"
    tuning = TUNING.model_copy(update={"micro_batch": 2})
    settings = SftSettings(tuning, ONE_RANK.model_copy(update={"ranks": 2}))
    result = run_sft("vlm", tiny_vlm_dir, toy_shards / "train", out, settings, on_metrics=lambda s, _: seen.append(s))
    assert seen == [5, 10, 15, 20, 25, 30] and result.samples == 24 and result.quarantined == 0
    assert result.loss_last < 0.6 * result.loss_first
    assert json.loads((out / "sft.json").read_text())["loss_last"] == result.loss_last
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    batch = [
        (
            VideoQuestion("what comes next?", frames, 8.0),
            "<think> the circle rises </think> <ans> the circle rises </ans>",
        )
    ]
    with torch.no_grad():
        before, after = (float(VlmPolicy.load(p).sft_loss(batch).mean) for p in (tiny_vlm_dir, out))
    assert after < 0.8 * before


def test_the_command_tunes_an_artist_and_its_text_encoder_by_the_runs_configuration_and_exports_the_average(
    toy_shards: Path, tiny_vdm_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sft"
    arguments = ["sft", "vdm", "toy", f"models.vdm={tiny_vdm_dir}", "sft.vdm.steps=30", "sft.vdm.batch=8"]
    arguments += [
        "sft.vdm.optim.lr=3.0e-3",
        "sft.vdm.optim.warmup_steps=2",
        "sft.vdm.log_every=5",
        "sft.vdm.optim.ema=0.9",
    ]
    arguments += ["sft.vdm.train_text_encoder=true", "learner.ranks=1", "learner.cpus=0.5"]
    arguments += ["--data", str(toy_shards / "train"), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "in 30 steps" in result.output and (out / "mlflow.db").is_file()
    told = json.loads((out / "sft.json").read_text())
    assert told["samples"] == 24 and told["settings"]["ema"] == 0.9 and told["settings"]["train_text_encoder"] is True
    assert told["loss_last"] < 0.9 * told["loss_first"]
    before, after = VdmPolicy.load(tiny_vdm_dir), VdmPolicy.load(out)
    assert before.embedder is not None and after.embedder is not None
    for old, new in ((before.module, after.module), (before.embedder.encoder, after.embedder.encoder)):
        assert any(not torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values()))


@pytest.mark.chaos
@pytest.mark.parametrize(
    "length",
    [
        {"steps": 6, "optim": OPTIM.model_copy(update={"ema": 0.9})},
        {
            "steps": None,
            "max_wall_s": 2.0,
            "optim": OPTIM.model_copy(update={"ema": 0.9, "schedule": "constant"}),
            "checkpoint_every": 2,
        },
    ],
    ids=["steps", "max_wall_s"],
)
def test_a_finished_run_called_again_trains_no_further(
    length: dict[str, Any], toy_shards: Path, tiny_vdm_dir: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "sft", SftSettings(TUNING.model_copy(update=length), ONE_RANK)
    result = run_sft("vdm", tiny_vdm_dir, toy_shards / "train", out, settings)
    assert result.steps == result.history[-1]["step"]
    assert (settings.tuning.max_wall_s or 0.0) <= result.train_s < result.wall_s
    stored = StoredCaptions(list(out.glob("captions/*/*.safetensors")), torch.device("cpu"))
    captions = distinct_captions([str(path) for path in (toy_shards / "train").glob("*.parquet")])
    assert len(stored) == len(captions) + 1  # each once, and the negative prompt
    policy = VdmPolicy.load(tiny_vdm_dir)
    frozen = CaptionEmbedder(None, None, policy.family.reading, 8, stored=stored)
    assert torch.equal(frozen.row(min(captions)), policy.embedder.row(min(captions)))  # type: ignore[union-attr]
    with pytest.raises(DataError, match="was not in the dataset"):
        stored("a caption that nobody wrote")
    after = VdmPolicy.load(out)
    again = run_sft("vdm", tiny_vdm_dir, toy_shards / "train", out, settings)
    assert (again.steps, again.train_s, again.history) == (result.steps, result.train_s, result.history)
    for a, b in zip(after.module.state_dict().values(), VdmPolicy.load(out).module.state_dict().values()):
        torch.testing.assert_close(a, b)


def test_what_cannot_work_is_said_before_training(toy_shards: Path, tiny_vlm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of ranks"):
        SftSettings(SftModelSection(steps=1, batch=5), LearnerSection(ranks=2))
    with pytest.raises(ConfigError, match="give one of steps, epochs and max_wall_s"):
        SftSettings(SftModelSection())
    with pytest.raises(ConfigError, match="must be vlm or vdm"):
        run_sft("clip", tiny_vlm_dir, toy_shards / "train", tmp_path / "o")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the model itself"):
        run_sft("vlm", tiny_vlm_dir, toy_shards / "train", tiny_vlm_dir)
    for settings, reason in (
        (SftSettings(learner=LearnerSection(ranks=64, cpus=1.0)), "sft needs CPU 64"),
        (
            SftSettings(learner=ONE_RANK.model_copy(update={"labels": {"room": "attic"}})),
            "no node has the labels room=attic, which sft is to stand on",
        ),
    ):
        with pytest.raises(PlacementError, match=reason):
            run_tracked_sft(prepare("vlm", tiny_vlm_dir, toy_shards / "train", tmp_path / "o", settings))
    with pytest.raises(DataError):
        run_sft("vlm", tiny_vlm_dir, tmp_path / "nothing", tmp_path / "o")
    assert not (tmp_path / "o").exists(), "neither a folder nor an MLflow store of a run that never was"
