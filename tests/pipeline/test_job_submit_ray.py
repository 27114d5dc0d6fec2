"""``ray job submit`` against a head on this machine runs both stages on real camera footage; MLflow tells the result.

The job evaluates on held-out samples while it trains, and is told to learn nothing in stage 1, which so ends early.
The head has its own ports, token and temporary folder, and is ended by process, so that no other Ray is touched.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest

from actors.weights.files import read_weights
from pipeline.checkpoint import CheckpointStore
from pipeline.data.real import make_real
from pipeline.tracking.profile import read_profiles
from tests.pipeline.run.test_held_out_ray import curves
from tests.processes import kill

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(ray_alone: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard on loopback; yields the environment that reaches it."""
    tmp_path = tmp_path_factory.mktemp("head")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # unix sockets need a short path
        command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=8"]
        command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]
        command += [
            f"--ray-client-server-port={free_port()}",
            "--object-store-memory=300000000",
            "--disable-usage-stats",
        ]
        log = (tmp_path / "head.log").open("w")
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
        try:
            wait_for(f"http://127.0.0.1:{dashboard}/api/version", token.read_text(), process, tmp_path / "head.log")
            yield {
                **environment,
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
                "CLUSTER": f"127.0.0.1:{port}",
            }
        finally:
            kill(process)
            log.close()


def wait_for(url: str, token: str, process: subprocess.Popen[str], log: Path, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no dashboard at {url} after {timeout_s} s: {log.read_text()}")


@pytest.fixture(scope="module")
def trained(head: dict[str, str], toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was submitted as a job."""
    folder = tmp_path_factory.mktemp("job")
    data, out = folder / "real", folder / "run"
    reports = make_real(data, quiet=True)
    assert reports["train"].accepted >= 4
    command = [RAY, "job", "submit", "--working-dir", str(ROOT)]  # Ray leaves out what .gitignore names
    command += ["--", sys.executable, "-m", "pipeline", "train", "real", f"out={out}"]
    command += [f"data.train={data}/train", f"data.eval={data}/test", f"data.val={toy_shards}/val"]
    command += ["stage1.steps=4", "stage2.steps=1", "stage2.optim.ema=0.5", "learner.ranks=1", "pools.vdm.workers=1"]
    command += ["evaluate.every=1", "evaluate.subset=4", "checkpoint.every=0", "tracking.clips_every=0"]
    command += ["evaluate.stop_if_not_better=1", "stage1.optim.lr=1e-12"]  # nothing moves, so no answer changes …
    command += ["deterministic=true"]  # … by the rounding of its batch either
    result = subprocess.run(command, env=head, capture_output=True, text=True, timeout=540, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert "succeeded" in result.stdout
    return out


@pytest.mark.timeout(600)
def test_a_submitted_job_trains_on_real_footage(trained: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{trained}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert {r.info.status for r in runs.values()} == {"FINISHED"}
    assert runs["stage1"].data.metrics["rollout/groups"] == 4
    for stage in ("stage1", "stage2"):  # a cosine: the tiny artist has only learnt to draw shapes, so of either sign
        assert 0 < abs(runs[stage].data.metrics["reward/clip_v_mean"]) <= 1
    for adapter in ("vlm_adapter", "vdm_adapter"):
        assert (trained / adapter / "adapter_model.safetensors").stat().st_size > 0


def test_a_stage_that_does_not_get_better_ends_and_the_best_is_exported(trained: Path) -> None:
    out, (found, tags) = trained, curves(trained)
    for stage in ("stage1", "stage2"):
        last = CheckpointStore(out / "checkpoints").latest(stage)
        assert last is not None and last.step == 1  # of four in stage 1, and of one in stage 2
        assert [step for step, _ in found[f"{stage}/evaluate/clip_v"]] == [0, 1]
    (_, base), (_, same) = found["stage1/evaluate/clip_v"]
    assert base == same and found["stage1/evaluate/since_best"] == [(0, 0.0), (1, 1.0)]
    assert "ends after 1 steps" in tags["stage1"]["vans.stopped_early"]

    told = json.loads((out / "best" / "best.json").read_text())
    best = max(  # of the run; of equal ones the earlier
        (value, -number, stage, step)
        for number, stage in enumerate(("stage1", "stage2"))
        for step, value in found[f"{stage}/evaluate/clip_v"][: 1 if stage == "stage1" else 2]
    )
    assert (told["value"], told["stage"], told["step"]) == (best[0], best[2], best[3])
    checkpoint = CheckpointStore(out / "checkpoints").load(
        out / "checkpoints" / f"{told['stage']}-step{told['step']:06d}"
    )
    policy = {"stage1": "vlm_adapter", "stage2": "vdm_adapter"}[told["stage"]]
    ours, theirs = (read_weights(folder / policy).tensors for folder in (out / "best", checkpoint.path))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in out.glob(".best*")} == set()
    assert all(profile.parts["held-out evaluation"] > 0 for profile in read_profiles(out))
    assert {path.name for path in out.glob("*_adapter")} == {"vlm_adapter", "vdm_adapter"}


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_is_scaled_with_the_token_stopped_gently_and_resumed(
    toy_shards: Path, head: dict[str, str], tmp_path: Path
) -> None:
    out, name = tmp_path / "run", "stopped-job"
    run = ["toy", f"out={out}", f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test", "checkpoint.every=0"]
    run += ["stage1.steps=60", "stage2.steps=0", "stage1.rollout={prompts_per_step: 4, group_size: 4}"]
    run += ["pools.vdm.workers=1", "tracking.clips_every=0"]

    def ray(*arguments: str) -> str:
        told = subprocess.run(
            [RAY, "job", *arguments], env=head, capture_output=True, text=True, timeout=400, check=False
        )
        return told.stdout + told.stderr

    def vans(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *arguments]
        return subprocess.run(
            command, env={**head, **changed}, capture_output=True, text=True, timeout=200, check=False
        )

    submit = ["submit", "--working-dir", str(ROOT), "--submission-id"]
    patience = ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "100"}}', "--no-wait"]
    train = ["--", sys.executable, "-m", "pipeline", "train", *run]
    told = ray(*submit, name, *patience, *train)
    assert "submitted" in told, told
    deadline = time.monotonic() + 600
    while "thinker 1/60" not in (log := ray("logs", name)):
        assert time.monotonic() < deadline, log[-6000:]
        time.sleep(0.5)

    grown = vans("scale", str(out), "vdm=2")
    assert grown.returncode == 0 and "vdm: 1 → 2 workers" in grown.stdout, grown.stdout + grown.stderr
    foreign = tmp_path / "foreign"
    foreign.write_text(secrets.token_hex(32))
    refused = vans("scale", "toy", "vdm=9", "--address", head["CLUSTER"], RAY_AUTH_TOKEN_PATH=str(foreign))
    assert refused.returncode == 2 and "token" in refused.stdout + refused.stderr, refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr

    ray("stop", name)
    log = ray("logs", name)
    assert "was stopped" in ray("status", name) and "--resume" in log and "Traceback" not in log, log[-6000:]
    checkpoint = CheckpointStore(out / "checkpoints").latest()
    assert checkpoint is not None and 1 <= checkpoint.step < 60

    resumed = ray(*submit, f"{name}-again", *train, "--resume")
    assert "succeeded" in resumed, resumed[-6000:]
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("vans")
    stage = client.search_runs([experiment.experiment_id], "tags.vans.stage = 'stage1'")
    (only,) = stage
    history = client.get_metric_history(only.info.run_id, "reward/total_mean")
    assert sorted(m.step for m in history) == list(range(60)) and only.info.status == "FINISHED"
