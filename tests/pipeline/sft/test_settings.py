"""What a run's configuration comes to for ``vans sft``: pure, without Ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from actors.learner.settings import LearnerSection
from actors.vdm.flow_sde import FlowMatchingSpec
from actors.vdm.settings import ConditioningSection
from cluster.errors import ConfigError
from pipeline.cli import app
from pipeline.config import load_config, parse_config
from pipeline.config.training import SftLoraSection, SftModelSection, SftOptimSection, SftVdmSection
from pipeline.data.decoder import VideoShape
from pipeline.data.video import VideoLimits
from pipeline.pretrain import Effort
from pipeline.sft import SftSettings, sft_settings
from pipeline.sft.loop import load_policy


def test_the_bundled_run_tunes_as_the_bundled_pair_was_tuned() -> None:
    run, effort = load_config("toy"), Effort()
    for kind in ("vlm", "vdm"):
        settings = sft_settings(run, kind)  # type: ignore[arg-type]
        tuning = settings.tuning
        assert (tuning.steps, tuning.batch, tuning.optim.lr, settings.learner.ranks, tuning.optim.ema) == (
            effort.sft_steps,
            effort.sft_batch,
            effort.sft_lr,
            effort.sft_ranks,
            0.95,
        )
        usual = SftSettings().tuning.optim
        assert (tuning.optim.warmup_steps, tuning.optim.schedule) == (usual.warmup_steps, usual.schedule)


def test_every_section_of_a_real_run_reaches_the_settings() -> None:
    run = parse_config(
        {
            "seed": 7,
            "models": {
                "vdm": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
                "vdm_adapter": "adapter",
                "flow_shift": 5.0,
                "negative_prompt": "blurry",
            },
            "video": {"num_frames": 33, "height": 352, "width": 640, "input_frames": 16, "reference_frames": 6},
            "data": {"decoders": 6, "max_pixels": 1280 * 720, "max_source_frames": 900, "max_quarantine_ratio": 0.01},
            "learner": {"ranks": 8, "cpus": 4, "gpus": 1, "dtype": "bfloat16", "activation_checkpointing": True},
            "sft": {
                "vdm": {
                    "epochs": 2,
                    "batch": 128,
                    "micro_batch": 2,
                    "optim": {
                        "lr": 1e-5,
                        "betas": [0.9, 0.95],
                        "weight_decay": 0.01,
                        "warmup_steps": 500,
                        "ema": 0.999,
                    },
                    "lora": {"rank": 8, "alpha": 16, "targets": ["to_q", "to_v"]},
                    "checkpoint_every": 250,
                    "max_failures": 3,
                    "log_every": 5,
                    "cache_mib": 64,
                }
            },
        }
    )
    assert sft_settings(run, "vdm") == SftSettings(
        SftVdmSection(
            epochs=2.0,
            batch=128,
            micro_batch=2,
            optim=SftOptimSection(lr=1e-5, warmup_steps=500, betas=(0.9, 0.95), weight_decay=0.01, ema=0.999),
            lora=SftLoraSection(rank=8, alpha=16.0, targets=["to_q", "to_v"]),
            checkpoint_every=250,
            max_failures=3,
            log_every=5,
            cache_mib=64,
        ),
        LearnerSection(ranks=8, cpus=4.0, gpus=1.0, dtype="bfloat16", activation_checkpointing=True, placement="PACK"),
        adapter="adapter",
        decoders=6,
        seed=7,
        shape=VideoShape(num_frames=33, height=352, width=640, input_frames=16),
        limits=VideoLimits(max_pixels=1280 * 720, max_frames=900),
        reference_frames=6,
        max_quarantine_ratio=0.01,
        policy_kwargs={
            "shift": 5.0,
            "grid": "diffusers",
            "negative_prompt": "blurry",
            "shared_times": True,
            "fps": 8.0,
            "tiling": None,
            "conditioning": ConditioningSection(),
        },
    )


def test_a_checkpoints_digest_and_sft_json_name_each_setting_flatly() -> None:
    lora = SftLoraSection(rank=8, alpha=16.0)
    optim = SftOptimSection(lr=1e-5, ema=0.9)
    facts = SftSettings(SftModelSection(steps=5, optim=optim, lora=lora, batch=4)).facts()
    named = ("lr", "schedule", "ema", "lora_rank", "lora_alpha", "lora_targets", "batch")
    assert [facts[name] for name in named] == [1e-5, "cosine", 0.9, 8, 16.0, None, 4]
    assert not {"optim", "lora", "tuning", "learner"} & facts.keys()
    assert (facts["steps"], facts["ranks"], facts["dtype"], facts["train_text_encoder"]) == (5, 1, "float32", False)
    assert facts["shape"] == asdict(VideoShape())


def test_a_run_without_a_length_is_asked_for_one_and_other_sections_are_heeded() -> None:
    with pytest.raises(ConfigError, match=r"sft.vlm: give one of .* e.g. sft.vlm.epochs=1"):
        sft_settings(parse_config({}), "vlm")
    with pytest.raises(ConfigError, match="batch=64 must be a multiple of ranks=3"):
        sft_settings(load_config("toy", ["learner.ranks=3"]), "vlm")
    assert sft_settings(load_config("toy", ["sft.vdm.train_text_encoder=true"]), "vdm").train_text_encoder
    assert sft_settings(load_config("toy"), "vlm").policy_kwargs == {"engine_dtype": "float32"}
    small = sft_settings(
        load_config("toy", ["learner.dtype=bfloat16", "video.vlm_height=64", "video.vlm_width=96"]), "vlm"
    )
    assert small.learner.dtype == "bfloat16" and (small.shape.vlm_height, small.shape.vlm_width) == (64, 96)


def test_the_command_refuses_before_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "o"
    told = CliRunner().invoke(app, ["sft", "clip", "toy"])
    assert told.exit_code == 2 and "neither vlm nor vdm" in told.output
    told = CliRunner().invoke(app, ["sft", "vlm", "toy", "--data", str(tmp_path / "no"), "--out", str(out)])
    assert told.exit_code == 2 and not out.exists()


def test_prompt_conditioning_and_levels_reach_the_policies_that_are_tuned(
    tiny_vlm_dir: Path, tiny_vdm_dir: Path
) -> None:
    run = load_config(
        "toy",
        [
            "models.prompt.answer_tag='[Ans]'",
            "video.conditioning={references: clip, time: shared}",
            "sft.vdm.timesteps=uniform",
            "sft.vdm.weighting=bell",
        ],
    )
    cpu = torch.device("cpu")
    thinker = load_policy("vlm", str(tiny_vlm_dir), sft_settings(run, "vlm"), 1, cpu)
    artist = load_policy("vdm", str(tiny_vdm_dir), sft_settings(run, "vdm"), 1, cpu)
    assert thinker.prompt == run.models.prompt and artist.conditioning == run.video.conditioning
    assert (artist.supervised.timesteps, artist.supervised.weighting) == ("uniform", "bell")
    plain = load_policy("vdm", str(tiny_vdm_dir), sft_settings(load_config("toy"), "vdm"), 1, cpu)
    assert (plain.supervised, plain.conditioning) == (FlowMatchingSpec(), ConditioningSection())
