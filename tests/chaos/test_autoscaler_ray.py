"""A whole run on a cluster that Ray's own autoscaler grows and shrinks: its fake provider starts real raylets, on a host of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ports import GCS
from tests.chaos.pool_harness import MIB
from tests.hosts import Host, hosts, missing

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1200)]

ADDRESS = f"127.0.0.1:{GCS}"  # of the host, which nothing else is on
DEADLINE_S = 400.0
STEPS = 60
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
)


def autoscaling() -> dict[str, Any]:
    """A head for everything but samplers; each of these needs a node that does not exist yet, and that nothing else has room on."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    sampler = {"CPU": 0, "sampler": 1, "object_store_memory": 100 * MIB}
    return {
        "cluster_name": "vans",
        "max_workers": 3,
        "idle_timeout_minutes": 0.2,
        "provider": {
            # By its name "fake_multinode" it reads a file that Ray's wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 8}, "node_config": {}, "max_workers": 0},
            "samplers": {"resources": sampler, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "head_node_type": "ray.head.default",
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        **{name: [] for name in COMMANDS},
    }


@dataclass(frozen=True)
class Cluster:
    """The host, and the environment of what is started on it."""

    host: Host
    env: dict[str, str]

    def sampler_nodes(self) -> int:
        """How many nodes for samplers there are."""
        found = 0
        for process in self.host.processes():
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            found += words[:1] != [] and words[0].endswith("/raylet") and any("sampler," in word for word in words)
        return found

    def vans(self, folder: Path, *words: str) -> str:
        """Return what `vans` prints on the host."""
        log = folder / f"{words[0]}.txt"
        log.unlink(missing_ok=True)
        done = self.host.start([sys.executable, "-m", "pipeline", *words], log, self.env).wait(120)
        assert done == 0, log.read_text()
        return log.read_text()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    if (why := missing()) is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="va", dir="/tmp"))
    (folder / "autoscaling.json").write_text(json.dumps(autoscaling()))
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "COLUMNS": "200",
        "RAY_ADDRESS": ADDRESS,
        "RAY_AUTH_MODE": "disabled",  # the provider hands no token on
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
    }
    named = dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    ray += [f"--port={GCS}", f"--temp-dir={folder}", "--num-cpus=8", f"--object-store-memory={400 * MIB}"]
    try:
        with hosts(1) as (host,):
            head = host.start(
                [*ray, f"--autoscaling-config={folder}/autoscaling.json"], folder / "head.txt", env | named
            )
            deadline = time.monotonic() + 90
            while "Ray runtime started" not in (folder / "head.txt").read_text():
                assert head.poll() is None and time.monotonic() < deadline, (folder / "head.txt").read_text()
                time.sleep(0.5)
            yield Cluster(host, env)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_scaling_a_pool_brings_nodes_up_and_lets_them_go(cluster: Cluster, toy_shards: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log.txt"
    overrides = [
        f"out={out}",
        f"data.train={toy_shards / 'train'}",
        f"data.eval={toy_shards / 'test'}",
        "cluster.can_grow=true",
        "pools.vdm.resources={sampler: 1.0}",
        "pools.vdm.cpus=0",
        "pools.vdm.workers=1",
        "stage1.steps=0",
        f"stage2={{steps: {STEPS}, anchor: truth, rollout: {{prompts_per_step: 4, group_size: 6}}}}",
        "checkpoint.every=1000",
        "tracking.rollouts.every=0",
    ]
    began = time.monotonic()

    def ready() -> int:
        (pool,) = (
            p for p in json.loads(cluster.vans(tmp_path, "status", str(out), "--json"))["pools"] if p["name"] == "vdm"
        )
        return sum(worker["state"] == "ready" for worker in pool["workers"])

    def until(found: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not found():
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{what}: {cluster.sampler_nodes()} nodes\n{log.read_text()}"
            time.sleep(0.5)
        print(f"{time.monotonic() - began:4.0f} s: {what}")

    assert cluster.sampler_nodes() == 0
    run = cluster.host.start([sys.executable, "-m", "pipeline", "train", "toy", *overrides], log, cluster.env)
    until(lambda: log.exists() and "artist 1/" in log.read_text(), "the run's first step, on a node that came for it")
    assert cluster.sampler_nodes() == 1
    assert "vdm: 1 → 3 workers" in cluster.vans(tmp_path, "scale", str(out), "vdm=3")
    until(lambda: cluster.sampler_nodes() == 3 and ready() == 3, "three samplers on three nodes")
    assert "vdm: 3 → 1 workers" in cluster.vans(tmp_path, "scale", str(out), "vdm=1")
    until(lambda: cluster.sampler_nodes() == 1 and ready() == 1, "one sampler, and the idle nodes are gone")
    assert run.wait(DEADLINE_S) == 0, log.read_text()
    print(f"{time.monotonic() - began:4.0f} s: the run has ended")
    deadline = time.monotonic() + 60
    while cluster.sampler_nodes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert cluster.sampler_nodes() == 0, "no node is left to a run that is over"
