"""Rewards in environments of their own: a package version that clashes with the run's, and one that cannot be installed.

Minutes long: Ray copies a virtual environment whole before pip installs into the copy.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from actors.pool.errors import PoolFailed
from pipeline.config import RunConfig, load_config
from pipeline.fleet.open import Fleet, cluster_session, open_fleet
from pipeline.stages.requests import score, score_request
from tests.pipeline.stages.test_stage1 import sample

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1800)]

CLASH = "1.15.0"

JUDGE = """
from actors.scoring.model import RewardModel


class Six(RewardModel):
    "The minor version of six that this process has."

    def score(self, requests):
        import six

        return [float(six.__version__.split(".")[1])] * len(requests)
"""


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_alone: None) -> Path:
    """A folder with the module ``six_judge``, which workers find too."""
    (tmp_path / "six_judge.py").write_text(JUDGE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tmp_path}")
    return tmp_path


def settings(clip: Path, env: str) -> RunConfig:
    return load_config(
        "toy",
        [
            f"models.clip={clip}",
            "models.rewards={ours: {model: 'six_judge:Six'}, theirs: {model: 'six_judge:Six'}}",
            "stage1.rewards.weights={format: 1.0}",
            "stage2.rewards.weights={clip_v: 1.0, ours: 1.0, theirs: 1.0}",
            f"pools.rewards={{theirs: {{cpus: 0.1, env: {env}}}, ours: {{cpus: 0.1}}}}",
        ],
    )


def values(config: RunConfig) -> dict[str, float]:
    async def ask(fleet: Fleet) -> dict[str, float]:
        s = sample()
        request = score_request(s, 0, ("clip_v", "ours", "theirs"), "", s.caption, s.target_frames)
        return (await score(fleet, s, request)).values

    async def run() -> dict[str, float]:
        async with open_fleet(config, only=("reward", "ours", "theirs")) as fleet:
            return await ask(fleet)

    with cluster_session(config):
        return asyncio.run(asyncio.wait_for(run(), 1500))


def minor(version: str) -> float:
    return float(version.split(".")[1])


def test_two_rewards_have_two_versions_of_one_package_by_pip(judges: Path, tiny_clip_dir: Path) -> None:
    found: Any = values(settings(tiny_clip_dir, f"{{pip: ['six=={CLASH}']}}"))
    assert found["theirs"] == minor(CLASH) != found["ours"] == minor(importlib.metadata.version("six"))
    assert found["clip_v"] == pytest.approx(1.0)


def test_a_reward_has_the_python_that_it_names(judges: Path, tiny_clip_dir: Path) -> None:
    """An environment that a person has made: a layer over this one with another version of a package."""
    folder = judges / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), f"six=={CLASH}"]
    subprocess.run(install, check=True)
    found = values(settings(tiny_clip_dir, f"{{python: {folder}/bin/python}}"))
    assert found["theirs"] == minor(CLASH) != found["ours"] == minor(importlib.metadata.version("six"))


def test_an_environment_that_cannot_be_built_says_what_pip_said(judges: Path, tiny_clip_dir: Path) -> None:
    with pytest.raises(PoolFailed) as caught:
        values(settings(tiny_clip_dir, "{pip: ['six==99.1.2']}"))
    message = str(caught.value)
    assert "pool theirs" in message and "its environment cannot be built" in message
    assert "No matching distribution found for six==99.1.2" in message and len(message.splitlines()) < 20
