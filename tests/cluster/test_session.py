"""Addresses and the workers' environment, without Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.session import (
    PACKAGES,
    ROOT,
    ClusterError,
    _start_embedded,
    connect,
    require_loopback,
    resolve_address,
    runtime_env,
)


def test_ray_address_wins_and_local_is_embedded() -> None:
    assert resolve_address(None, {}) is None and resolve_address("local", {}) is None
    assert resolve_address("10.0.0.1:6379", {}) == "10.0.0.1:6379"
    assert resolve_address(None, {"RAY_ADDRESS": "10.0.0.2:6379"}) == "10.0.0.2:6379"
    assert resolve_address("10.0.0.1:6379", {"RAY_ADDRESS": "local"}) is None


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://10.0.0.1:10001"])
def test_addresses_that_no_driver_can_join_say_what_to_do(address: str) -> None:
    with pytest.raises(ClusterError, match="ray job submit"):
        resolve_address(address, {})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_nobody_at_the_address_is_an_error_within_seconds(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other modules of the session may have one
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=address):
        with connect(address):
            pass
    assert time.monotonic() - began < 5


def test_embedded_workers_read_this_clone() -> None:
    env = runtime_env({"PYTHONPATH": "/a", "OMP_NUM_THREADS": "4"}, {"X": "1"}, embedded=True)
    assert env["env_vars"]["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/a"])
    assert env["env_vars"]["OMP_NUM_THREADS"] == "4" and env["env_vars"]["X"] == "1"
    assert "py_modules" not in env


def test_a_joined_cluster_gets_the_packages_unless_a_job_brings_them() -> None:
    env = runtime_env({}, {}, embedded=False)
    assert env["py_modules"] == [str(ROOT / package) for package in PACKAGES]
    assert env["env_vars"]["OMP_NUM_THREADS"] == "1" and "PYTHONPATH" not in env["env_vars"]
    job = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"OMP_NUM_THREADS": "8"}}}
    env = runtime_env({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}, {}, embedded=False)
    assert "py_modules" not in env and "OMP_NUM_THREADS" not in env["env_vars"]  # Ray refuses to be told twice


def test_a_machine_that_cannot_talk_to_itself_is_told_before_ray_tries(tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--net", "--"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no network namespaces")
    words = [sys.executable, "-c", "from cluster.session import require_loopback; require_loopback()"]
    done = subprocess.run([*inside, *words], capture_output=True, text=True, timeout=60, check=False)
    assert "ClusterError: 127.0.0.1 does not answer" in done.stderr and "ip link set lo up" in done.stderr
    require_loopback()


@pytest.mark.parametrize(("slow_starts", "starts"), [(1, 2), (2, 2)])
def test_ray_that_does_not_come_up_in_its_own_time_is_started_once_more(
    slow_starts: int, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises a bare Exception then; no machine of a test is slow enough for it."""
    import ray

    tried: list[str] = []

    def init(**options: object) -> None:
        tried.append(str(options["address"]))
        if len(tried) <= slow_starts:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    if slow_starts < 2:
        _start_embedded(1, 0, 64, {})
    else:
        with pytest.raises(ClusterError, match=r"1 CPU slots\) did not start: The current node timed out"):
            _start_embedded(1, 0, 64, {})
    assert tried == ["local"] * starts
