"""The embed pool in the configuration: none by default, a fourth pool from one worker on."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from pipeline.config import load_config
from pipeline.fleet.open import placement_plan, pool_sections
from pipeline.run.learners import learner_spec
from pipeline.stages.stage2 import Stage2


def test_there_is_no_such_pool_unless_it_has_workers() -> None:
    without = load_config("toy")
    assert tuple(pool_sections(without)) == ("vlm", "vdm", "reward")
    assert [ask.role for ask in placement_plan(without).asks] == ["vlm", "vdm", "reward", "learner"]
    run = load_config("toy", ["pools.embed={workers: 2, gpus: 0.5, max_batch: 4}"])
    assert tuple(pool_sections(run)) == ("vlm", "embed", "vdm", "reward")
    ask = next(ask for ask in placement_plan(run).asks if ask.role == "embed")
    assert (ask.count, ask.gpus) == (2, 0.5)
    assert pool_sections(run)["embed"].max_batch == 4
    assert [ask.role for ask in placement_plan(run, only=("reward",)).asks] == ["reward"]


def test_a_deterministic_run_asks_the_pool_alone_and_in_float32() -> None:
    run = load_config("toy", ["deterministic=true", "pools.embed.workers=1"])
    assert pool_sections(run)["embed"].max_batch == 1
    with pytest.raises(ConfigError, match=r"pools\.embed\.dtype=bfloat16"):
        load_config("toy", ["deterministic=true", "pools.embed.dtype=bfloat16"])


def test_an_autoscaled_pool_starts_with_a_worker() -> None:
    with pytest.raises(ConfigError, match="workers=0 with autoscale"):
        load_config("toy", ["pools.embed.autoscale.enabled=true"])


def test_a_vdm_learner_loads_the_transformer_alone() -> None:
    config = load_config("toy", ["learner.micro_steps=1", "learner.reference_offload=true"])
    spec = learner_spec(config, Stage2(config, None), "vdm")  # type: ignore[arg-type]
    assert spec.policy_kwargs["components"] == ("transformer",)
    assert (spec.settings.micro_steps, spec.settings.reference_offload) == (1, True)
