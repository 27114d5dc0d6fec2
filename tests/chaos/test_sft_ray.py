"""``vans sft`` as a process: where it listens while it trains, and what becomes of it when a rank hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.processes import command, family, members, until

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.mark.timeout(900)
def test_it_listens_on_loopback_alone_and_survives_a_rank_that_hangs(
    ray_alone: None, toy_shards: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "sft", tmp_path / "log"
    arguments = ["sft", "vlm", "toy", f"out={tmp_path / 'run'}", "sft.vlm.steps=400", "sft.vlm.batch=8"]
    arguments += ["sft.vlm.max_failures=1", "sft.vlm.checkpoint_every=5", "learner.step_timeout_s=15"]
    arguments += ["--data", str(toy_shards / "train"), "--out", str(out)]

    def checkpoints() -> set[Path]:
        return {path for path in (out / "checkpoints").glob("*/checkpoint_*") if path.is_dir()}

    with command(log, *arguments) as run:
        until(lambda: bool(checkpoints()), run, log)
        pids = {process.pid for process in family(run)} | {run.pid}
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in pids}
        assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        ranks = members(run, "RayTrainWorker")
        assert len(ranks) == 2, [" ".join(p.cmdline()) for p in family(run)]
        os.kill(ranks[1].pid, signal.SIGSTOP)
        before = checkpoints()
        until(lambda: bool(checkpoints() - before) and len(members(run, "RayTrainWorker")) == 2, run, log)
        alive = {process.pid for process in members(run, "RayTrainWorker")}
        assert not alive & {process.pid for process in ranks}, "both ranks were started anew"
