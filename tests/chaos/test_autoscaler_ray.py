"""A whole run on a cluster that Ray's own autoscaler grows and shrinks: its fake provider starts real raylets on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.ports import GCS
from tests.chaos.pool_harness import MIB

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1200), pytest.mark.usefixtures("ray_alone")]

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "COLUMNS": "200"}
ADDRESS = f"127.0.0.1:{GCS}"
HEAD = "ray.head.default"  # what the fake provider calls it
IDLE_MIN = 0.2
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)
DEADLINE_S = 400.0
STEPS = 60


@pytest.fixture
def sampler_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A head for everything but samplers; each sampler needs a node that does not exist yet. Gives how many such nodes there are."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.cluster_utils import AutoscalingCluster

    class FakeCluster(AutoscalingCluster):
        """Ray's, whose wheel lacks the file that this configuration is usually read from."""

        def _generate_config(self, head_resources: dict, worker_node_types: dict, **more: object) -> dict:  # type: ignore[override]
            head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
            return {
                "cluster_name": "vans",
                "max_workers": 3,
                "idle_timeout_minutes": IDLE_MIN,
                "provider": {
                    "type": "external",  # "fake_multinode" looks for that file
                    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                    "use_node_id_as_ip": True,
                    "disable_node_updaters": True,
                    "disable_launch_config_check": True,
                    "launch_multiple": True,
                    "head_node_id": FAKE_HEAD_NODE_ID,
                },
                "available_node_types": {HEAD: head, **worker_node_types},
                "head_node_type": HEAD,
                "auth": {"ssh_user": "nobody"},
                "file_mounts": {},
                **{name: [] for name in (*COMMANDS, "cluster_synced_files")},
            }

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    node = {"resources": {"CPU": 0, "sampler": 1, "object_store_memory": 100 * MIB}, "node_config": {}}
    head = {"CPU": 8, "object_store_memory": 400 * MIB}
    cluster = FakeCluster(head, {"samplers": {**node, "min_workers": 0, "max_workers": 3}}, autoscaler_v2=True)
    cluster.start(override_env={"RAY_AUTH_MODE": "disabled"})  # as the clusters that tests start in their own process
    try:
        ray.init(address=ADDRESS, log_to_driver=False, logging_level="error")
        yield lambda: sum("sampler" in each["Resources"] for each in ray.nodes() if each["Alive"])
    finally:
        ray.shutdown()
        cluster.shutdown()


def vans(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ready(out: Path) -> int:
    """How many samplers of the run serve."""
    (pool,) = (pool for pool in json.loads(vans("status", str(out), "--json"))["pools"] if pool["name"] == "vdm")
    return sum(worker["state"] == "ready" for worker in pool["workers"])


def test_scaling_a_pool_brings_nodes_up_and_lets_them_go(
    sampler_nodes: Callable[[], int], toy_shards: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log.txt"
    overrides = [
        f"out={out}",
        f"data.train={toy_shards / 'train'}",
        f"data.eval={toy_shards / 'test'}",
        f"cluster.address={ADDRESS}",
        "cluster.can_grow=true",
        "pools.vdm.resources={sampler: 1.0}",
        "pools.vdm.cpus=0",  # nodes for samplers alone: what decodes videos would keep them busy
        "pools.vdm.workers=1",
        "stage1.steps=0",
        f"stage2={{steps: {STEPS}, anchor: truth, rollout: {{prompts_per_step: 4, group_size: 6}}}}",
        "checkpoint.every=1000",
        "tracking.rollouts.every=0",
    ]
    began = time.monotonic()

    def until(found: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not found():
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{what}: {sampler_nodes()} nodes\n{log.read_text()}"
            time.sleep(0.5)
        print(f"{time.monotonic() - began:4.0f} s: {what}")

    assert sampler_nodes() == 0
    with (
        log.open("wb") as told,
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", "train", "toy", *overrides],
            env=ENV,
            stdout=told,
            stderr=subprocess.STDOUT,
        ) as run,
    ):
        try:
            until(lambda: "artist 1/" in log.read_text(), "the run's first step, on a node that came for it")
            assert sampler_nodes() == 1
            assert "vdm: 1 → 3 workers" in vans("scale", str(out), "vdm=3")
            until(lambda: sampler_nodes() == 3 and ready(out) == 3, "three samplers on three nodes")
            assert "vdm: 3 → 1 workers" in vans("scale", str(out), "vdm=1")
            until(lambda: sampler_nodes() == 1 and ready(out) == 1, "one sampler, and the idle nodes are gone")
            assert run.wait(DEADLINE_S) == 0, log.read_text()
        finally:
            run.kill()
    print(f"{time.monotonic() - began:4.0f} s: the run has ended")
    deadline = time.monotonic() + 60
    while sampler_nodes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert sampler_nodes() == 0, "no node is left to a run that is over"
