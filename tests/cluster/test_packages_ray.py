"""What lies in the working directory takes the place of no package, in the driver and in a Ray worker; a user's reward is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[2]

IN_A_WORKER = """
import json
import pipeline
import ray
from cluster.session import connect

@ray.remote
def look():
    import actors, cluster, pipeline, rewards, torch
    from rewards.custom import load_reward
    found = {module.__name__: module.__file__ for module in (actors, cluster, pipeline, rewards, torch)}
    found["reward"] = load_reward("mine:mine")(clip=0)
    for path in ("rewards:mine", "rewards.mine:mine"):
        try:
            load_reward(path)
        except Exception as error:
            found[path] = str(error)
    return found

with connect(local_cpus=1, object_store_mib=80):
    print(json.dumps(ray.get(look.remote())))
"""


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """Return a folder with files and folders that are called like our packages and like libraries, and with a user's reward."""
    for name in ("actors", "cluster", "torch", "ray", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')\n")
    (tmp_path / "rewards.py").write_text("def mine(*, clip, **_):\n    return 2.0\n")
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("raise SystemExit('the wrong actors')\n")
    (tmp_path / "mine.py").write_text("def mine(*, clip, **_):\n    return 1.0\n")
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )


def test_every_package_is_known_by_a_file_of_its_own() -> None:
    for name, mark in PACKAGES.items():
        assert (ROOT / name / mark).is_file()


def test_the_driver_imports_its_own_packages_and_then_the_user_s_modules(crowded: Path) -> None:
    found = python(
        crowded,
        "-c",  # as with -m, the working directory is the first entry
        "import sys; assert sys.path[0] == ''; import pipeline, actors, cluster, rewards, yaml, mine\n"
        "print(*(m.__file__ for m in (pipeline, actors, cluster, rewards, yaml, mine)), sep='\\n')",
    )
    assert found.returncode == 0, found.stdout + found.stderr
    *ours, library, users = found.stdout.splitlines()
    assert ours == [str(ROOT / name / "__init__.py") for name in ("pipeline", "actors", "cluster", "rewards")]
    assert not Path(library).is_relative_to(crowded)
    assert Path(users).samefile(crowded / "mine.py")


def test_a_clone_in_the_working_directory_stays_first() -> None:
    found = python(ROOT, "-c", "import sys, pipeline; print(repr(sys.path[0]))")
    assert found.stdout.strip() == "''", found.stderr


def test_python_m_pipeline_runs_there(crowded: Path) -> None:
    found = python(crowded, "-m", "pipeline", "train", "toy", "no.such=1", "--dry-run")
    assert found.returncode == 2, found.stdout + found.stderr
    assert "unknown key" in found.stderr


@pytest.mark.ray
def test_a_worker_imports_the_program_s_packages_and_the_user_s_reward(crowded: Path) -> None:
    found = python(crowded, "-c", IN_A_WORKER)
    assert found.returncode == 0, found.stdout + found.stderr
    seen = json.loads(found.stdout.splitlines()[-1])
    assert {name: seen[name] for name in PACKAGES} == {name: str(ROOT / name / "__init__.py") for name in PACKAGES}
    assert not Path(seen["torch"]).is_relative_to(crowded)
    assert seen["reward"] == 1.0
    for path in ("rewards:mine", "rewards.mine:mine"):
        assert f"{crowded / 'rewards.py'} is not what is imported as 'rewards'" in seen[path]
        assert f"write my_{path}" in seen[path]
