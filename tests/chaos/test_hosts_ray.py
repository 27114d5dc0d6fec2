"""Runs across two hosts with addresses of their own, one of which loses its network: for shorter, and for longer, than Ray waits."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.test_exact_resume_ray import histories, weights
from tests.hosts import Host, hosts, missing, start_node, start_ray
from tests.processes import until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(1200)]

SHORT_S = 10.0
STEPS = {"stage1": 4, "stage2": 2}
FAR_CPUS = 2.0


@dataclass(frozen=True)
class Cluster:
    """Ray on two hosts, and what an undisturbed run there has left."""

    head: Host
    far: Host
    env: dict[str, str]
    """Of drivers."""
    folder: Path
    """Of the nodes' logs."""
    peaceful: Path


@pytest.fixture(scope="module")
def cluster(ray_alone: None, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
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
    out = tmp_path_factory.mktemp("peaceful") / "run"
    try:
        with hosts(2) as (head, far):
            env |= {"RAY_ADDRESS": start_ray([head, far], [8.0, FAR_CPUS], folder, env)}
            found, log = Cluster(head, far, env, folder, out), out.with_name("log")
            assert train(found, out, toy_shards, log).wait(600) == 0, log.read_text()
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def train(cluster: Cluster, out: Path, shards: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a deterministic run on the head's host, whose learner has a rank on each of the two."""
    values = [f"out={out}", f"data.train={shards}/train", f"data.eval={shards}/test", "deterministic=true"]
    values += ["learner.ranks=2", "learner.placement=STRICT_SPREAD", "checkpoint.every=1"]
    values += [f"{stage}.steps={steps}" for stage, steps in STEPS.items()]
    values += [
        "stage1.rollout={prompts_per_step: 2, group_size: 4}",
        "stage2.rollout={prompts_per_step: 2, group_size: 4}",
    ]
    values += ["stage2.anchor_min_rouge=0.2", "stage2.render.steps=6"]
    return cluster.head.start([sys.executable, "-m", "pipeline", "train", "toy", *values], log, cluster.env)


def under_way(cluster: Cluster, out: Path, shards: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start such a run; return it when it has its first checkpoint."""
    process = train(cluster, out, shards, log)
    until(lambda: any((out / "checkpoints").glob("stage1-step*")), process, log)
    assert cluster.head.runs("LearnerRank") and cluster.far.runs("LearnerRank")
    return process


def compare(cluster: Cluster, out: Path) -> int:
    """Hold the figures and weights of ``out`` to the undisturbed run's; return how many figures there are."""
    expected, found = histories(cluster.peaceful), histories(out)
    for stage, steps in STEPS.items():
        assert [step for step, _ in found[f"{stage}/reward/total_mean"]] == list(range(steps))
    assert found == expected and weights(out) == weights(cluster.peaceful)
    return sum(map(len, found.values()))


def test_a_cut_shorter_than_rays_patience_between_the_hosts_of_the_ranks_changes_no_figure(
    cluster: Cluster, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = under_way(cluster, out, toy_shards, log)
    cluster.far.cut()
    try:
        time.sleep(SHORT_S)
        assert process.poll() is None, log.read_text()
    finally:
        cluster.far.mend()
    assert process.wait(600) == 0, log.read_text()
    assert "Ray has lost the node" not in log.read_text()
    with capsys.disabled():
        print(f"\ncut for {SHORT_S:g} s: {compare(cluster, out)} figures equal to the undisturbed run's")


def test_a_host_that_is_lost_and_comes_back_costs_a_restart_of_the_ranks_and_no_figure(
    cluster: Cluster, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = under_way(cluster, out, toy_shards, log)
    cluster.far.cut()
    began = time.monotonic()
    try:
        until(lambda: "Ray has lost the node" in log.read_text(), process, log)
        lasted = time.monotonic() - began
    finally:
        cluster.far.mend()
    cluster.far.kill()  # what is left of the node that Ray has given up
    start_node(cluster.far, FAR_CPUS, cluster.head, 2, cluster.folder, cluster.env)
    assert process.wait(900) == 0, log.read_text()
    told = log.read_text()
    assert f"Ray has lost the node {cluster.far.address}" in told and "restart 1 of at most" in told
    assert "state-dump" not in told and "(raylet)" not in told
    with capsys.disabled():
        figures = compare(cluster, out)
        print(f"\ncut for {lasted:.0f} s, until Ray gave it up: {figures} figures equal to the undisturbed run's")
