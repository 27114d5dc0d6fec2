"""Speeds by hand: what a step's work comes to per second, and what of the GPUs' peak. Unknown figures are missing, not 0."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.architectures import architecture, cost
from actors.pool.protocol import WorkerInfo
from cluster.hardware import Hardware, rates_of
from pipeline.config import RunConfig, load_config
from pipeline.fleet.models import ASSETS
from pipeline.plan.demands import stage_demands
from pipeline.plan.models import load_models
from pipeline.stages import speed
from pipeline.stages.speed import Speeds, WorkCosts, gained
from pipeline.tracking.metrics import find

pytestmark = pytest.mark.slow

STEP = {"profile/step_s": 10.0, "profile/vlm/busy_s": 4.0, "profile/vlm/idle_s": 16.0, "profile/vdm/busy_s": 5.0}
STEP |= {"profile/vdm/idle_s": 5.0}


@cache
def thinker() -> dict[str, Any]:
    """The toy's thinker as a worker tells of it."""
    return dict(architecture(ASSETS / "vlm", "vlm").components["model"])


@dataclass
class Pool:
    """A pool whose workers have counted ``counts``, and stand on ``nodes``."""

    name: str
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    nodes: tuple[str, ...] = ("10.0.0.1",)
    config: dict[str, Any] = field(default_factory=lambda: thinker())

    async def call_all(self, method: str) -> dict[str, dict[str, Any]]:
        return {"counters": self.counts, "config": {"vlm-0": self.config}}[method]

    def infos(self) -> dict[str, WorkerInfo]:
        return {
            f"{self.name}-{i}": WorkerInfo(f"{self.name}-{i}", node, 1, "cuda") for i, node in enumerate(self.nodes)
        }


@pytest.fixture(scope="module")
def toy() -> RunConfig:
    return load_config("toy", [])


@pytest.fixture(scope="module")
def costs(toy: RunConfig) -> WorkCosts:
    return WorkCosts(toy, thinker())


def on_gpus(config: RunConfig) -> RunConfig:
    """``config`` with whole GPUs in bfloat16 for all."""
    values = config.model_dump(mode="json")
    for pool in ("vlm", "vdm"):
        values["pools"][pool] |= {"gpus": 1.0, "dtype": "bfloat16"}
    values["learner"] |= {"gpus": 1.0, "dtype": "bfloat16", "ranks": 2}
    return RunConfig.model_validate(values)


def step_of(
    config: RunConfig, counts: Mapping[str, dict[str, dict[str, float]]], costs: WorkCosts, times: Mapping[str, float]
) -> dict[str, float]:
    """Return the samplers' metrics of a step in which they counted ``counts``, and before it nothing."""

    async def story() -> dict[str, float]:
        fleet: Any = SimpleNamespace(vlm=Pool("vlm"), vdm=Pool("vdm"))
        speeds = Speeds(config)
        await speeds.begin(fleet)
        return await speeds.samplers(fleet, {"vlm": {}, "vdm": {}, **counts}, times)

    return asyncio.run(story())


CLIPS = {"clips": 6.0, "latents": 60.0, "passes": 120.0, "captions": 2.0, "references": 3.0}


def test_a_sampler_of_clips_by_hand(toy: RunConfig, costs: WorkCosts) -> None:
    found = step_of(toy, {"vdm": {"vdm-0": CLIPS}}, costs, STEP)
    shapes = costs.shapes
    flops = 120 * shapes.transformer_flops(costs.clip).total + 6 * costs.decode + 3 * costs.condition
    flops += 2 * shapes.text_encoder_flops(64).total
    assert found["speed/vdm/latents_per_s"] == 60 / 5  # one worker, at work for half of the step
    assert found["speed/vdm/flops_per_s"] == pytest.approx(flops / 5)
    assert not [
        name for name in found if name.endswith("/mfu") or "vlm" in name
    ]  # on CPUs; and the thinker did nothing


def test_two_engines_that_worked_a_fifth_of_the_step(toy: RunConfig, costs: WorkCosts) -> None:
    one = {"prompts": 2.0, "prompt_tokens": 80.0, "completions": 8.0, "tokens": 160.0, "videos": 2.0}
    found = step_of(toy, {"vlm": {"vlm-0": one, "vlm-1": one}}, costs, STEP)
    assert found["speed/vlm/tokens_per_s"] == 320 / 2
    prompt = replace(costs.prompt, text=40 - costs.prompt.video)  # as long as was counted
    assert found["speed/vlm/flops_per_s"] == pytest.approx(
        4 * cost.generate_flops(costs.vlm, prompt, 20, 4).total / 2, rel=1e-6
    )


def test_mfu_is_of_all_gpus_and_missing_where_a_card_is_not_known(
    toy: RunConfig, costs: WorkCosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_gpus(toy)
    monkeypatch.setattr(speed, "accelerators", lambda: {"10.0.0.1": "H200"})
    found = step_of(config, {"vdm": {"vdm-0": CLIPS}}, costs, STEP)
    assert found["speed/vdm/mfu"] == pytest.approx(found["speed/vdm/flops_per_s"] / 989e12)
    monkeypatch.setattr(speed, "accelerators", lambda: {"10.0.0.1": "P40"})
    found = step_of(config, {"vdm": {"vdm-0": CLIPS}}, costs, STEP)
    assert "speed/vdm/flops_per_s" in found and "speed/vdm/mfu" not in found


def test_a_learner_by_the_planners_count(toy: RunConfig, costs: WorkCosts, monkeypatch: pytest.MonkeyPatch) -> None:
    config = on_gpus(toy)
    one, two = config.stage1, config.stage2
    rates = rates_of(Hardware(1, 8, 141.0), "h200", mfu=0.4)
    planned = {
        d.name: d for s in stage_demands(config, load_models(config), rates) if s.name == "stage2" for d in s.demands
    }
    monkeypatch.setattr(speed, "accelerators", lambda: {"a": "H200", "b": "H200"})

    async def story() -> dict[str, float]:
        speeds = Speeds(config)
        await speeds.begin(SimpleNamespace(vlm=Pool("vlm"), vdm=Pool("vdm")))  # type: ignore[arg-type]
        group: Any = SimpleNamespace(infos=[SimpleNamespace(node="a"), SimpleNamespace(node="b")])
        experiences = two.rollout.prompts_per_step * two.rollout.group_size
        found = await speeds.learner("learner/", "vdm", group, experiences, 100.0, 4.0)
        none = await speeds.learner("learner/", "vlm", group, 0, 0.0, 0.0)
        answers = one.rollout.prompts_per_step * one.rollout.group_size
        words = await speeds.learner("learner/vlm/", "vlm", group, answers, answers * 9.0, 2.0)
        return found | none | words

    found = asyncio.run(story())
    assert not config.learner.activation_checkpointing  # the planner counts what is recomputed, an MFU does not
    learn = planned["learn"]
    assert found["speed/learner/flops_per_s"] == pytest.approx(learn.units * learn.unit_s * rates.bf16 / 4)
    assert found["speed/learner/latents_per_s"] == 25.0
    assert found["speed/learner/mfu"] == pytest.approx(found["speed/learner/flops_per_s"] / (2 * 989e12))
    assert found["speed/learner/vlm/tokens_per_s"] == pytest.approx(
        one.rollout.prompts_per_step * one.rollout.group_size * 9.0 / 2
    )
    assert "speed/learner/tokens_per_s" not in found
    assert all(find(name) for name in found)


def test_a_lost_worker_and_a_new_one_take_nothing_from_the_others() -> None:
    before = {"a": {"clips": 10.0}, "b": {"clips": 90.0}}
    assert gained(before, {"a": {"clips": 14.0}, "c": {"clips": 3.0}}) == {"clips": 7.0}


def test_a_model_that_cannot_be_counted_leaves_the_rates(toy: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> dict[str, float]:
        fleet: Any = SimpleNamespace(vlm=Pool("vlm", config={"model_type": "odd"}), vdm=Pool("vdm"))
        speeds = Speeds(toy)
        await speeds.begin(fleet)
        return await speeds.samplers(fleet, {"vlm": {}, "vdm": {"vdm-0": CLIPS}}, STEP)

    assert asyncio.run(story()) == {"speed/vdm/latents_per_s": 12.0}
    assert "the models cannot be counted: 'vision_config'" in caplog.text


def test_the_driver_loads_no_library_of_models_to_count(tmp_path: Path) -> None:
    told = tmp_path / "thinker.json"
    told.write_text(json.dumps(thinker()))
    script = (
        "import json, pathlib, sys; from pipeline.config import load_config; from pipeline.stages.speed import WorkCosts\n"
        "costs = WorkCosts(load_config('toy', []), json.loads(pathlib.Path(sys.argv[1]).read_text()))\n"
        "print(costs.learnt('vdm', 1, 1.0, None) > 0, *{'transformers', 'diffusers', 'vllm'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(told)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stdout + done.stderr
