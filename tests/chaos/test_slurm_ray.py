"""The Slurm script under Slurm itself, on two hosts with addresses of their own: to its end, stopped, and queued again."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.manifests import Site
from pipeline.commands.manifests import write_manifests
from tests.hosts import hosts
from tests.slurm import Slurm, missing, slurm

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
STEPS = {"stage1": 4, "stage2": 2}
RUN_S = 500.0


@pytest.fixture(scope="module")
def cluster(ray_alone: None) -> Iterator[Slurm]:
    if (why := missing()) is not None:
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="vs", dir="/tmp"))  # short: sockets are made below it
    activated = folder / "activate"
    activated.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}"\n')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "SLURM_"))}
    try:
        with hosts(2) as both, slurm(both, folder, kept | {"VANS_ENV": str(activated)}) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def submit(cluster: Slurm, out: Path, shards: Path, steps: int = STEPS["stage1"]) -> str:
    """Write the script of a run whose learner has a rank on each host, queue it, and return the job's number."""
    values = [f"out={out}", f"data.train={shards}/train", f"data.eval={shards}/test", "checkpoint.every=1"]
    values += ["learner.ranks=2", "learner.placement=STRICT_SPREAD"]
    values += [f"stage1.steps={steps}", f"stage2.steps={STEPS['stage2']}"]
    values += [f"{stage}.rollout={{prompts_per_step: 2, group_size: 4}}" for stage in STEPS]
    values += ["stage2.anchor_min_rouge=0.2", "stage2.render.steps=6"]
    (script,) = write_manifests("toy", values, "slurm", out.parent / "slurm", Site(shared=str(out.parent)))
    return cluster.call("sbatch", "--parsable", str(script)).strip()


def said(cluster: Slurm, job: str) -> str:
    return (cluster.folder / f"toy-{job}.log").read_text()


def until(condition: Callable[[], bool], cluster: Slurm, job: str) -> None:
    deadline = time.monotonic() + RUN_S
    while not condition():
        assert cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), said(cluster, job)
        assert time.monotonic() < deadline, said(cluster, job)
        time.sleep(0.2)


def steps_kept(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints").glob("stage*-step*")}


def test_a_run_that_is_told_of_its_time_limit_is_queued_again_and_goes_on_to_its_end(
    cluster: Slurm, toy_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, out, toy_shards)
    until(lambda: bool(steps_kept(out)), cluster, job)
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # as Slurm does ten minutes before the limit
    until(lambda: cluster.state(job) == "PENDING", cluster, job)
    assert "Restarts=1" in cluster.call("scontrol", "show", "job", job)
    before = steps_kept(out)
    assert before and not any(name.startswith("stage2") for name in before)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait two minutes
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=RUN_S) == "COMPLETED"
    log = said(cluster, job)
    assert log.count("Ray head on") == 2 and "the driver ended with exit code 143" in log
    assert "the driver ended with exit code 0" in log
    assert (out / "vlm_adapter").is_dir() and (out / "vdm_adapter").is_dir()
    assert not list(tmp_path.glob(".ray-token*"))


def test_scancel_stops_a_run_after_a_checkpoint_for_good(cluster: Slurm, toy_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(cluster, out, toy_shards, steps=500)
    until(lambda: bool(steps_kept(out)), cluster, job)
    cluster.call("scancel", "--signal=TERM", "--batch", job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=RUN_S) == "FAILED"
    assert "ExitCode=143:0" in cluster.call("scontrol", "show", "job", job)
    log = said(cluster, job)
    assert "the driver ended with exit code 143" in log and "--resume" in log
    assert max(steps_kept(out)) in log
