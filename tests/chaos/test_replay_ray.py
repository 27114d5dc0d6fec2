"""A deterministic run's stored steps, fed to the learner alone, give the update's figures of the run to the last bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from pipeline.config import load_config
from pipeline.run.replay import replay
from pipeline.run.train import run_training
from pipeline.tracking.experiences import experiences_path, read_experiences, write_experiences
from pipeline.tracking.rollouts import stored_steps

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

STEPS = 3


@pytest.fixture(scope="module")
def run(ray_alone: None, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "run"
    values = [f"out={out}", f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test", "deterministic=true"]
    values += [f"{stage}.steps={STEPS}" for stage in ("stage1", "stage2")] + ["checkpoint.every=2"]
    values += [f"{stage}.rollout={{prompts_per_step: 2, group_size: 4}}" for stage in ("stage1", "stage2")]
    values += ["stage2.anchor_min_rouge=0.2", "stage1.optim.ema=0.5", "tracking.rollouts={replay: true}"]
    run_training(load_config("toy", values))
    assert len(stored_steps(out)) == 2 * STEPS
    return out


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_replayed_step_has_the_figures_of_the_run(run: Path, stage: str, step: int) -> None:
    found = replay(run, step, stage)
    assert {"learner/loss", "learner/grad_norm", "learner/ratio_max_dev"} <= {figure.name for figure in found.figures}
    assert [figure for figure in found.figures if not figure.equal] == []
    assert any(figure.run for figure in found.figures if figure.name == "learner/grad_norm")


def test_a_step_that_was_changed_is_told_apart(run: Path) -> None:
    (step,) = [each for each in stored_steps(run) if (each.stage, each.step) == ("stage1", 0)]
    path = experiences_path(step.path)
    kept = path.read_bytes()
    items = read_experiences(path)["vlm"]
    other = math.nextafter(items[0].advantage, math.inf) + 1e-3
    try:
        write_experiences(path, {"vlm": [dataclasses.replace(items[0], advantage=other), *items[1:]]})
        assert not replay(run, 0, "stage1").equal
    finally:
        path.write_bytes(kept)


def test_what_cannot_be_replayed_is_told(run: Path) -> None:
    with pytest.raises(ConfigError, match="say which: --stage"):
        replay(run, 0)
    with pytest.raises(
        ConfigError, match=r"no weights from before step 1 of stage1.*stage1-step000003, stage1-step000002"
    ):
        replay(run, 1, "stage1")
    with pytest.raises(
        ConfigError, match=r"step 9 are not stored.*stage1 0, stage1 1.*tracking\.rollouts\.replay=true"
    ):
        replay(run, 9)
