"""A stored step, fed to a new learner, gives the figures of the update that it was stored with, to the last bit.

Real learners on Ray with the bundled thinker; the completions are made up, so that neither engine nor pools are started. A
whole run is replayed in ``tests/chaos/test_replay_ray.py``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.learner.group import LearnerGroup
from actors.records import Completion, Sample, Scores
from cluster.errors import ConfigError
from pipeline.checkpoint import CheckpointStore
from pipeline.cli import app
from pipeline.config import RunConfig, load_config, to_yaml
from pipeline.data.toy import make_sample
from pipeline.run.learners import learner_spec
from pipeline.run.replay import replay
from pipeline.stages.groups import Group, Member, RolloutBatch, assemble
from pipeline.stages.stage1 import Stage1
from pipeline.tracking.experiences import experiences_path
from pipeline.tracking.rollouts import FOLDER, step_rollouts, stored_steps, write_step

STEP = 2


def batch() -> RolloutBatch:
    """Two groups of two completions of random tokens, with random rewards."""
    rng, groups = np.random.default_rng(0), []
    for place in range(2):
        toy = make_sample(place, "test")
        sample = Sample(toy.id, toy.kind, toy.question, toy.caption, toy.input_frames, toy.target_frames)  # type: ignore[arg-type]
        members = []
        for i in range(2):
            tokens = rng.integers(20, 200, 6 + i, dtype=np.int32)
            completion = Completion("", tokens, rng.uniform(-3, -1, len(tokens)).astype(np.float32), "stop", 0)
            members.append(Member(i, "c", Scores(sample.id, i, {"x": rng.random()}), completion))
        groups.append(Group(sample, tuple(members)))
    return assemble(groups, {"x": 1.0}, std_norm="group", normalise_rewards=False, min_group=2, trained_version=0)


async def learn_twice(config: RunConfig, stage: Stage1, made: RolloutBatch) -> dict[str, float]:
    """Update once, write the checkpoint after it, update again; returns the second one's figures."""
    items, store = stage.experiences(made, "vlm"), CheckpointStore(config.out / "checkpoints")
    learner = LearnerGroup(learner_spec(config, stage, "vlm"))
    try:
        await learner.start()
        await learner.update(items)
        with store.write("stage1", STEP) as folder:
            await learner.save(str(folder / "vlm_learner"))
        return await learner.update(items)
    finally:
        await learner.close()


@pytest.fixture(scope="module")
def run(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "run"
    config = load_config("toy", [f"out={out}", "deterministic=true", "learner.ranks=1"])
    out.mkdir()
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    stage, made = Stage1(config, None), batch()  # type: ignore[arg-type]
    figures = asyncio.run(learn_twice(config, stage, made))
    for step in (STEP - 1, STEP):
        about: dict[str, Any] = {"clips": "none", "group_size": 2, "weights": {"x": 1.0}, "fps": 8.0}
        about |= {"figures": {f"learner/{n}": v for n, v in figures.items()} | {"reward/total_mean": 0.5}}
        experiences = {"vlm": stage.experiences(made, "vlm")}
        write_step(out / FOLDER, step_rollouts("stage1", step, made, **about, experiences=experiences))
    return out


def test_the_figures_are_the_updates_to_the_last_bit(run: Path) -> None:
    found = replay(run, STEP)
    assert (found.stage, found.begun) == ("stage1", "stage1-step000002")
    named = {figure.name: figure for figure in found.figures}
    assert {"learner/loss", "learner/grad_norm", "learner/lr", "learner/entropy"} <= set(named)
    assert "reward/total_mean" not in named
    assert [figure for figure in found.figures if not figure.equal] == [] and found.equal
    assert named["learner/grad_norm"].run


def test_what_cannot_be_replayed_is_told(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights from before step 1 of stage1.*stage1-step000002"):
        replay(run, STEP - 1)
    with pytest.raises(
        ConfigError, match=r"step 9 are not stored.*stage1 1, stage1 2.*tracking\.rollouts\.replay=true"
    ):
        replay(run, 9)
    with pytest.raises(ConfigError, match="not a run's folder"):
        replay(run / FOLDER, STEP)


def test_the_command_tells_by_its_exit_code_that_figures_differ(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run import replay as room

    async def other(*_: object) -> dict[str, float]:
        return {"learner/loss": 1.0, "learner/lr": 2e-3}

    monkeypatch.setattr(room, "_update", other)
    done = CliRunner().invoke(app, ["replay", str(run), str(STEP)])
    assert done.exit_code == 1 and "figures are the run's to the last bit" in done.output, done.output
    assert "learner/loss" in done.output and "stage1 step 2, from stage1-step000002" in done.output


def test_a_step_written_again_without_tensors_has_none(tmp_path: Path) -> None:
    about: dict[str, Any] = {"clips": "none", "group_size": 2, "weights": {"x": 1.0}, "fps": 8.0, "figures": {}}
    made = batch()
    stage = Stage1(load_config("toy"), None)  # type: ignore[arg-type]
    experiences = {"vlm": stage.experiences(made, "vlm")}
    for given in (experiences, None):
        path = write_step(tmp_path / FOLDER, step_rollouts("stage1", 0, made, **about, experiences=given))
        assert experiences_path(path).is_file() == (given is not None)
    assert len(stored_steps(tmp_path)) == 1
