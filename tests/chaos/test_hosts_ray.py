"""A run across two hosts with addresses of their own, one of which loses its network for a while."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.test_exact_resume_ray import histories, weights
from tests.hosts import Host, hosts, missing, start_ray
from tests.processes import until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(1500)]

CUT_S = 10.0
STEPS = {"stage1": 4, "stage2": 2}


@pytest.fixture
def two_hosts() -> Iterator[tuple[list[Host], str, dict[str, str], Path]]:
    """Ray on two hosts: the hosts, its address, the environment for drivers, and the folder of logs."""
    if (why := missing()) is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="vh", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONUNBUFFERED": "1",
    }
    try:
        with hosts(2) as made:
            yield made, start_ray(made, [8, 2], folder, env), env, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def train(head: Host, out: Path, shards: Path, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a deterministic run on ``head`` whose learner has a rank on each of two hosts."""
    values = [f"out={out}", f"data.train={shards}/train", f"data.eval={shards}/test", "deterministic=true"]
    values += ["learner.ranks=2", "learner.placement=STRICT_SPREAD", "checkpoint.every=1"]
    values += [f"{stage}.steps={steps}" for stage, steps in STEPS.items()]
    values += [
        "stage1.rollout={prompts_per_step: 2, group_size: 4}",
        "stage2.rollout={prompts_per_step: 2, group_size: 4}",
    ]
    values += ["stage2.anchor_min_rouge=0.2", "stage2.render.steps=6"]
    return head.start([sys.executable, "-m", "pipeline", "train", "toy", *values], log, env)


def test_a_cut_of_ten_seconds_between_the_hosts_of_the_ranks_changes_no_figure(
    ray_alone: None,
    two_hosts: tuple[list[Host], str, dict[str, str], Path],
    toy_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (head, far), address, env, _ = two_hosts
    env |= {"RAY_ADDRESS": address}
    peaceful, cut, log = tmp_path / "peaceful", tmp_path / "cut", tmp_path / "log"
    assert train(head, peaceful, toy_shards, env, log).wait(600) == 0, log.read_text()
    process = train(head, cut, toy_shards, env, log)
    until(lambda: any((cut / "checkpoints").glob("stage1-step*")), process, log)
    assert head.runs("LearnerRank") and far.runs("LearnerRank")
    far.cut()
    try:
        time.sleep(CUT_S)
        assert process.poll() is None, log.read_text()
        done = len(list((cut / "checkpoints").iterdir()))
    finally:
        far.mend()
    assert process.wait(600) == 0, log.read_text()
    expected, found = histories(peaceful), histories(cut)
    for stage, steps in STEPS.items():
        assert [step for step, _ in found[f"{stage}/reward/total_mean"]] == list(range(steps))
    assert found == expected and weights(cut) == weights(peaceful)
    told = log.read_text()
    assert "Ray has lost the node" not in told and "state-dump" not in told
    with capsys.disabled():
        points = sum(map(len, found.values()))
        print(f"\ncut for {CUT_S:g} s after {done} checkpoints: {points} metric values equal to the undisturbed run's")
