"""What one part of a run hands to the next: folders by their names, averages per policy, and stages that never ran."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from actors.learner.spec import LearnerSpec
from cluster.errors import ConfigError
from pipeline.checkpoint import TrainState
from pipeline.config import RunConfig, load_config
from pipeline.run.learners import export_name, learner_spec, serve_averages
from pipeline.run.start import require_trainable
from pipeline.run.train import Run
from pipeline.stages.all_in_one import AllInOne
from pipeline.stages.stage1 import Stage1


@dataclass
class Pool:
    """A pool that remembers what it serves."""

    version: int = 2
    payload: Any = "the weights"

    async def set_weights(self, version: int, payload: Any) -> None:
        self.version, self.payload = version, payload


@dataclass
class Learner:
    """A learner after two updates."""

    spec: LearnerSpec
    version: int = 2

    async def publish(self, *, averaged: bool = False) -> str:
        return "their average" if averaged else "the weights"


@pytest.mark.parametrize(("vlm", "vdm"), [(0.0, 0.5), (0.5, 0.0), (0.5, 0.5), (0.0, 0.0)])
def test_all_in_one_serves_the_average_of_each_policy_that_keeps_one(vlm: float, vdm: float) -> None:
    config = load_config("toy", ["training=all_in_one", f"stage1.optim.ema={vlm}", f"stage2.optim.ema={vdm}"])
    pools = {"vlm": Pool(), "vdm": Pool()}
    stage = AllInOne(config, SimpleNamespace(**pools))  # type: ignore[arg-type]
    learners = {policy: Learner(learner_spec(config, stage, policy)) for policy in stage.policies}
    asyncio.run(serve_averages(stage, learners))  # type: ignore[arg-type]
    for policy, decay in (("vlm", vlm), ("vdm", vdm)):
        assert pools[policy] == (Pool(3, "their average") if decay else Pool())


def test_a_stage_of_no_steps_hands_nothing_on_when_the_run_is_resumed(tmp_path: Path) -> None:
    config = load_config("toy", [f"out={tmp_path}", "stage1.steps=0", "stage2.anchor=truth"])
    run = Run(config, None, Console(file=io.StringIO()), None, None)  # type: ignore[arg-type]
    fleet = SimpleNamespace(vlm=Pool())
    state = TrainState("stage2", 1, extra={"versions": {"vlm": 0, "vdm": 1}})
    asyncio.run(run.stage(Stage1, fleet, state))  # type: ignore[arg-type]
    assert fleet.vlm == Pool()


def test_what_is_exported_is_named_for_what_it_is() -> None:
    config = load_config("toy", ["stage2.lora.rank=0"])
    assert [export_name(config, policy) for policy in ("vlm", "vdm")] == ["vlm_adapter", "vdm_model"]


def test_clips_that_ranks_cannot_share_are_refused_before_the_start() -> None:
    require_trainable(load_config("toy", ["learner.ranks=4", "learner.context_parallel=4"]))
    with pytest.raises(
        ConfigError, match=r"context_parallel=3 must divide the artist's attention heads \(4\) and a clip's"
    ):
        require_trainable(load_config("toy", ["learner.ranks=3", "learner.context_parallel=3"]))
    with pytest.raises(ConfigError, match=r"context_parallel=2 must divide ranks=3"):
        load_config("toy", ["learner.ranks=3", "learner.context_parallel=2"])
    require_trainable(load_config("toy", ["pools.vdm.context_parallel=4"]))
    with pytest.raises(
        ConfigError, match=r"pools.vdm.context_parallel=3 must divide the artist's attention heads \(4\)"
    ):
        require_trainable(load_config("toy", ["pools.vdm.context_parallel=3"]))
    with pytest.raises(
        ConfigError, match=r"context_parallel=2 with gpus=1: a worker of as many processes needs gpus: 2"
    ):
        load_config("toy", ["pools.vdm.context_parallel=2", "pools.vdm.gpus=1"])
    with pytest.raises(ConfigError, match="context_parallel=2 with compile_blocks"):
        load_config("toy", ["pools.vdm.context_parallel=2", "pools.vdm.compile_blocks=true"])


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["models.vlm_adapter=a", "stage1.lora.rank=0"], "vlm"),
        (["models.vdm_adapter=a", "stage2.lora.rank=0"], "vdm"),
        (["models.vdm_adapter=a", "stage2.lora.rank=0", "stage2.steps=0", "training=all_in_one"], "vdm"),
        (["models.vlm_adapter=a", "stage1.lora.rank=0", "stage1.steps=0"], None),
        (["models.vlm_adapter=a", "stage2.lora.rank=0"], None),
        (["stage1.lora.rank=0", "stage2.lora.rank=0"], None),
    ],
)
def test_full_weights_are_not_trained_through_an_adapter(overrides: list[str], refused: str | None) -> None:
    config: RunConfig = load_config("toy", overrides)
    if refused is None:
        require_trainable(config)
        return
    with pytest.raises(ConfigError, match=rf"models\.{refused}_adapter='a' with stage\d\.lora\.rank=0"):
        require_trainable(config)
