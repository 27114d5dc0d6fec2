"""Slurm itself on hosts of ``tests.hosts``: munge, a controller on the first host and a node on each. Nothing stands in for anything.

Debian's `slurm-wlm` and `munge` are needed; ``missing`` says what is not there. Their files lie in one folder, and their processes
are killed with their hosts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Host
from tests.hosts import missing as hosts_missing

CPUS = 16
"""Of a node, as Slurm is told: it may give out more than this machine has."""
START_S = 60.0
CONFIGURATION = """
ClusterName=vans
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there can be no Slurm here, or None."""
    if absent := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return hosts_missing()


@dataclass(frozen=True)
class Slurm:
    """A Slurm that runs."""

    first: Host
    folder: Path
    env: Mapping[str, str]

    def call(self, *command: str) -> str:
        """Return what ``command`` prints on the first host; raises RuntimeError with its message where it fails."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.first.name, *command],
            env={**self.env, "SLURM_CONF": str(self.folder / "slurm.conf")},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """Return the state of ``job``, such as RUNNING."""
        fields = dict(part.split("=", 1) for part in self.call("scontrol", "show", "job", job).split() if "=" in part)
        return fields["JobState"]

    def wait_for(self, job: str, *states: str, seconds: float) -> str:
        """Return which of ``states`` ``job`` has come to; raises RuntimeError with its log where it comes to none."""
        until = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > until:
                logs = "\n".join(path.read_text() for path in self.folder.glob(f"*{job}.log"))
                raise RuntimeError(f"job {job} is {state}, not {' or '.join(states)}:\n{logs[-6000:]}")
            time.sleep(0.5)
        return state


@contextmanager
def slurm(where: list[Host], folder: Path, env: Mapping[str, str]) -> Iterator[Slurm]:
    """Run Slurm on the hosts ``where`` for the block; jobs that it starts have ``env`` through sbatch."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} CPUs={CPUS} RealMemory=2000 State=UNKNOWN" for host in where
    )
    text = CONFIGURATION.format(first=where[0].name, address=where[0].address, folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(text)
    # Nothing is bound to cgroups; without this line slurmd looks for a cgroup tree, which a namespace does not show.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", *(f"spool-{host.name}" for host in where)):
        (folder / name).mkdir()
    found = Slurm(where[0], folder, env)
    daemon_env = {**env, "SLURM_CONF": str(folder / "slurm.conf")}
    names = ("socket", "pid", "log", "seed")
    munge = [f"--{name}{'-file' if name != 'socket' else ''}={folder}/munge.{name}" for name in names]
    where[0].start(["munged", "--foreground", "--force", f"--key-file={key}", *munge], folder / "munged.log", env)
    _until(lambda: (folder / "munge.socket").exists(), folder)
    where[0].start(["slurmctld", "-D"], folder / "slurmctld.log", daemon_env)
    for host in where:
        host.start(["slurmd", "-D"], folder / f"slurmd-{host.name}.log", daemon_env)
    _until(lambda: _answers(found) == ["idle"] * len(where), folder)
    yield found


def _answers(found: Slurm) -> list[str]:
    try:
        return found.call("sinfo", "--noheader", "--Node", "--format=%t").split()
    except RuntimeError:  # the controller is not up yet
        return []


def _until(condition: object, folder: Path) -> None:
    assert callable(condition)
    until = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > until:
            logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in folder.glob("*.log"))
            raise RuntimeError(f"Slurm did not come up:\n{logs}")
        time.sleep(0.2)
