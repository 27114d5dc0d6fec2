"""A run in surroundings that are none of its making: a tracking server that goes and comes back, and a machine with
one core, few files, little shared memory, no network, no name, a strict umask, and a program that cannot be written to."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import psutil
import pytest

from pipeline.checkpoint import CheckpointStore
from tests.processes import PATIENCE_S, command, kill, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


def arguments(out: Path, shards: Path, *more: str) -> list[str]:
    values = ["toy", f"out={out}", f"data.train={shards}/train", f"data.eval={shards}/test", "tracking.clips_every=0"]
    values += ["pools.vdm.workers=1", "learner.ranks=1", "stage2.steps=0", "checkpoint.every=1"]
    return [*values, "stage1.rollout={prompts_per_step: 2, group_size: 2}", *more]


def ended_whole(log: Path) -> None:
    text = log.read_text()
    assert "Traceback" not in text and "\nerror:" not in text, text[-8000:]


@contextmanager
def tracking_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's own server over a sqlite file; SIGKILL with all its workers at the end of the block."""
    folder.mkdir(exist_ok=True)
    words = ["server", "--backend-store-uri", f"sqlite:///{folder}/store.db", "--artifacts-destination", str(folder)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "server.log").open("ab") as stream:
        server = subprocess.Popen([sys.executable, "-m", "mlflow", *words], stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-4000:]
            time.sleep(0.2)
        yield server
    finally:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        server.wait(30)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_tracking_server_that_is_killed_and_comes_back_in_a_stage_misses_no_step(
    ray_alone: None, toy_shards: Path, tmp_path: Path
) -> None:
    out, log, port = tmp_path / "run", tmp_path / "log", free_port()
    steps, store = 30, CheckpointStore(out / "checkpoints", 3)

    def step() -> int:
        newest = next(iter(store.paths()), None)
        return int(newest.name[-6:]) if newest else 0

    given = arguments(out, toy_shards, f"stage1.steps={steps}", f"tracking.uri=http://127.0.0.1:{port}")
    with tracking_server(tmp_path / "server", port):
        process = command(log, "train", *given)
        run = process.__enter__()
        try:
            until(lambda: step() >= 2, run, log)
        except BaseException:
            process.__exit__(None, None, None)
            raise
    try:
        gone = step()
        until(lambda: step() >= gone + 2, run, log)  # the run goes on without
        with tracking_server(tmp_path / "server", port):
            assert run.wait(PATIENCE_S) == 0, log.read_text()[-8000:]
            client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
            experiment = client.get_experiment_by_name("vans")
            assert experiment is not None
            runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
            points = client.get_metric_history(runs["stage1"].info.run_id, "time/step_s")
    finally:
        process.__exit__(None, None, None)
    assert sorted(point.step for point in points) == list(range(steps))
    assert {found.info.status for found in runs.values()} == {"FINISHED"}
    ended_whole(log)


def test_a_small_machine_without_network_or_name_trains(ray_alone: None, toy_shards: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    program = tmp_path / "program"
    inside = [
        "set -e; ip link set lo up",
        f"mkdir -p {program} && mount --bind {ROOT} {program} && mount -o remount,ro,bind {program}",
        "mount -t tmpfs -o size=64m tmpfs /dev/shm",
        "hostname no-such-host-anywhere",
        "ulimit -n 256; umask 077",
        f"cd {program}; export PYTHONPATH={program} PYTHONDONTWRITEBYTECODE=1 LC_ALL=C",
        'exec taskset -c 0 "$@"',
    ]
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    namespaces = ["unshare", *mapped, "--net", "--mount", "--uts"]
    if not shutil.which("ip") or subprocess.run([*namespaces, "ip", "link", "set", "lo", "up"], check=False).returncode:
        pytest.skip("this machine gives no namespaces")
    train = [sys.executable, "-m", "pipeline", "train", *arguments(out, toy_shards, "stage1.steps=1")]
    with log.open("ab") as stream:
        words = [*namespaces, "bash", "-c", "\n".join(inside), "inside", *train]
        run = subprocess.Popen(words, stdout=stream, stderr=stream)
    try:
        assert run.wait(PATIENCE_S) == 0, log.read_text()[-8000:]
    finally:
        kill(run)
    assert CheckpointStore(out / "checkpoints", 3).latest() is not None
    assert not [path for path in out.rglob("*") if path.stat().st_mode & 0o077]  # the umask holds
    ended_whole(log)
