"""What a run's YAML says about learning arrives at the learner, for both stages."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.run.learners import learner_spec
from pipeline.sft.settings import sft_settings
from pipeline.stages.stage1 import Stage1
from pipeline.stages.stage2 import Stage2

STAGES = {"stage1": Stage1, "stage2": Stage2}


def spec(stage: str, *overrides: str) -> Any:
    config = load_config("toy", [f"{stage}.{o}" for o in overrides])
    kind = STAGES[stage](config, None)  # type: ignore[arg-type]
    return learner_spec(config, kind, kind.policies[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_learner_holds_its_stages_own_sections(stage: str) -> None:
    config = load_config("toy", [f"{stage}.optim.lr=2e-4", f"{stage}.grpo.kl_beta=0.07"])
    section, kind = getattr(config, stage), STAGES[stage](config, None)  # type: ignore[arg-type]
    found = learner_spec(config, kind, kind.policies[0])
    assert found.optim is section.optim and found.learning is section.grpo and found.lora is section.lora
    assert found.settings is config.learner


def test_no_adapter_is_learnt_at_rank_0() -> None:
    assert spec("stage1", "lora.rank=0").lora is None and spec("stage2", "lora.rank=0").lora is None


def test_completions_have_a_micro_batch_of_their_own_and_share_prompts() -> None:
    learner = ["learner.micro_batch=6", "learner.micro_completions=24", "learner.shared_prompts=false"]
    config = load_config("toy", learner)
    one, two = (learner_spec(config, kind(config, None), kind.policies[0]) for kind in STAGES.values())  # type: ignore[arg-type, attr-defined]
    assert [spec.settings.at_once(spec.kind) for spec in (one, two)] == [24, 6]
    assert one.policy_kwargs["shared_prompts"] is False and "shared_prompts" not in two.policy_kwargs
    assert spec("stage1").policy_kwargs["shared_prompts"] is True
    usual = spec("stage1").settings
    assert usual.at_once("vlm") == usual.at_once("vdm") == load_config("toy").learner.micro_batch


def test_the_thinkers_positions_are_those_of_the_engines_dtype() -> None:
    """The learner computes in another dtype than the engine here."""
    dtypes = ["pools.vlm.dtype=bfloat16", "learner.dtype=float32"]
    config = load_config("toy", [*dtypes, "sft.vlm.steps=1"])
    stage = STAGES["stage1"](config, None)  # type: ignore[arg-type]
    assert learner_spec(config, stage, "vlm").policy_kwargs["engine_dtype"] == "bfloat16"
    assert sft_settings(config, "vlm").policy_kwargs["engine_dtype"] == "bfloat16"


def test_each_stage_has_its_own_kl_and_longest_trajectory() -> None:
    assert spec("stage1").learning.kl_estimator == "k3" and spec("stage2").learning.kl_estimator == "closed"
    assert spec("stage1", "grpo.kl_estimator=k1").learning.kl_estimator == "k1"
    assert spec("stage1", "text.max_tokens=33").longest == 33
    assert spec("stage2", "text.max_tokens=33", "sde.window_size=3").longest == 3


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_the_objective_of_a_stage_reaches_its_learner(name: str) -> None:
    found = spec("stage1", f"objective={name}", f"{name}.clip_low=0.07", f"{name}.epochs_per_batch=3", "steps=10")
    assert (found.objective, found.learning.clip_low, found.total_steps) == (name, 0.07, 30)
    assert spec("stage2").objective == "grpo"


def test_schedules_end_at_the_last_optimizer_step() -> None:
    assert spec("stage1", "steps=10", "grpo.updates_per_batch=2", "grpo.epochs_per_batch=3").total_steps == 60


def test_defaults_are_the_papers() -> None:
    run = RunConfig()
    for stage in (run.stage1, run.stage2):
        assert (stage.optim.lr, stage.rollout.group_size, stage.lora.rank, stage.lora.alpha) == (5e-5, 8, 8, 32.0)
    assert (run.stage2.grpo.clip_low, run.stage2.grpo.clip_high, run.stage2.grpo.kl_beta) == (1e-3, 1e-3, 0.004)
    assert run.stage2.anchor_min_rouge == 0.6
