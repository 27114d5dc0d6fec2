"""The Slurm script really run, with a stand-in for Slurm: two Ray nodes on this machine, one token, the driver, and what it leaves.

``srun`` and ``scontrol`` are small scripts on PATH that start the step here; all else is real: Ray, its token, the run.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.manifests import Group, RunShape, Site, render

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
ROOT = Path(__file__).resolve().parents[2]

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
# A step's node has ports of its own; here all nodes are one machine.
exec "$@" --dashboard-agent-listen-port="$(free)" --dashboard-agent-grpc-port="$(free)" --object-store-memory=100000000
"""
FREE = (
    "#!/bin/bash\nexec python -c 'import socket; s = socket.socket(); s.bind((\"\", 0)); print(s.getsockname()[1])'\n"
)
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> "$CALLS"\n[[ "$1" == show ]] && printf "node1\\nnode2\\n" || true\n'
DRIVER = """
import os, signal, sys, time
import ray
from cluster.session import connect
with connect() as session:
    print("nodes", len(session.view().nodes), "slots", session.view().total()["CPU"], flush=True)
    if sys.argv[1] == "wait":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        print("driver is up", flush=True)
        while not stopped:
            time.sleep(0.1)
        sys.exit(143)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def job(tmp_path: Path, scratch: str, mode: str) -> tuple[subprocess.Popen[str], Path]:
    """Start the script that is written for two nodes; return it and the file of Slurm's calls."""
    bin_, calls, driver = tmp_path / "bin", tmp_path / "calls", tmp_path / "driver.py"
    bin_.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("free", FREE)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    driver.write_text(DRIVER)
    run = RunShape("s", (Group("vdm", 2, {"CPU": 1.0}, {}, "STRICT_SPREAD"),), ("python", str(driver), mode))
    (script,) = render("slurm", run, Site(shared=str(tmp_path / "shared"))).values()
    script = script.replace("/tmp/ray-$SLURM_JOB_ID", scratch)  # a short path that the test removes
    (tmp_path / "job.sbatch").write_text(script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "SLURM_"))}
    environment |= {
        "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CALLS": str(calls),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "RAY_PORT": str(free_port()),
        "RAY_DASHBOARD_PORT": str(free_port()),
        "RAY_CLIENT_PORT": str(free_port()),
    }
    command = ["bash", str(tmp_path / "job.sbatch")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True), calls


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["finish", "wait"])
def test_two_nodes_join_the_driver_runs_and_the_time_limit_queues_it_again(
    ray_alone: None, tmp_path: Path, mode: str
) -> None:
    scratch = tempfile.mkdtemp(prefix="ray-")
    try:
        process, calls = job(tmp_path, scratch, mode)
        seen = ""
        assert process.stdout is not None
        if mode == "wait":
            for line in process.stdout:
                seen += line
                if "driver is up" in line:
                    assert oct((tmp_path / "shared" / ".ray-token-17").stat().st_mode & 0o777) == "0o600"
                    process.send_signal(signal.SIGUSR1)  # as Slurm does before the time limit
                    break
        rest, _ = process.communicate(timeout=400)
        seen += rest
        assert process.returncode == (143 if mode == "wait" else 0), seen
        assert "nodes 2 slots 4.0" in seen, seen
        told = calls.read_text()
        assert ("scontrol requeue 17" in told) == (mode == "wait")
        assert "--nodelist=node1" in told and "--exclude=node1" in told
        assert not list((tmp_path / "shared").glob(".ray-token*"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
