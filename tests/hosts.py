"""Hosts of a cluster on one machine: network namespaces with an address, a host name and a loopback of their own, on one bridge.

Root, Linux and `ip` are needed; ``missing`` says what is not there. A link can be cut and mended. Whatever happens in the block, all
processes in the namespaces are killed at its end, and namespaces, links and the bridge are removed. Delay and loss are not made here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PORT = 6379
START_S = 90.0


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def missing() -> str | None:
    """Return why hosts cannot be made here, or None."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "`ip` or `unshare` is not installed (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"vans{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", f"b{os.getpid()}", "type", "bridge")
    except RuntimeError as error:
        return f"this kernel or container makes no namespaces or bridges: {error}"
    finally:
        _ip("link", "del", f"b{os.getpid()}", check=False)
        _ip("netns", "del", name, check=False)
    return None


@dataclass(frozen=True)
class Host:
    """One host: its namespace and host name, its address, and the bridge's end of its link."""

    name: str
    address: str
    link: str

    def start(self, command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start ``command`` on this host; it writes to the end of ``log``."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name, *command]
        with log.open("ab") as stream:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *named], stdout=stream, stderr=stream, env=dict(env)
            )

    def processes(self) -> list[psutil.Process]:
        """Return what runs on this host."""
        found = []
        for pid in _ip("netns", "pids", self.name, check=False).split():
            try:
                found.append(psutil.Process(int(pid)))
            except psutil.NoSuchProcess:
                continue
        return found

    def runs(self, word: str) -> bool:
        """Return whether a process of this host has ``word`` in its command line, as an actor's has its class."""
        for process in self.processes():
            try:
                if word in " ".join(process.cmdline()):
                    return True
            except psutil.NoSuchProcess:
                continue
        return False

    def cut(self) -> None:
        """Cut the host off from all others."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """End :meth:`cut`."""
        _ip("link", "set", self.link, "up")

    def kill(self) -> None:
        """End everything on this host at once, as a loss of power does."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make ``count`` hosts for the block."""
    tag = os.getpid() % 100_000  # names of interfaces have 15 letters at most
    bridge, net = f"vans{tag}", f"10.77.{tag % 250}"
    made = [Host(f"vans{tag}h{i}", f"{net}.{i}", f"vans{tag}l{i}") for i in range(1, count + 1)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for host in made:
            _ip("netns", "add", host.name)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                _ip("-n", host.name, "link", "set", link, "up")
        yield made
    finally:
        for host in made:
            host.kill()
        for host in made:
            psutil.wait_procs(host.processes(), timeout=20)
            _ip("netns", "del", host.name, check=False)
            _ip("link", "del", host.link, check=False)
        _ip("link", "del", bridge, check=False)


def start_ray(where: list[Host], cpus: list[float], folder: Path, env: Mapping[str, str]) -> str:
    """Start Ray's head on the first of the hosts and a node on each other; return the address, once all have joined.

    ``folder``: Ray's temporary folder and the nodes' logs, with a short name, because sockets are made below it.
    """
    address = f"{where[0].address}:{PORT}"
    for number, (host, slots) in enumerate(zip(where, cpus, strict=True), start=1):
        start_node(host, slots, where[0], number, folder, env)
    return address


def start_node(host: Host, cpus: float, head: Host, nodes: int, folder: Path, env: Mapping[str, str]) -> None:
    """Start a node of Ray on ``host``, the head where it is ``head``; return when the cluster has ``nodes`` nodes."""
    address = f"{head.address}:{PORT}"
    first = ["--head", f"--port={PORT}", f"--temp-dir={folder / 'ray'}", "--include-dashboard=false"]
    join = first if host is head else [f"--address={address}"]
    size = [f"--num-cpus={cpus:g}", f"--object-store-memory={256 << 20}", f"--node-ip-address={host.address}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *join, *size, "--block", "--disable-usage-stats"]
    process = host.start(command, folder / f"{host.name}.log", env)
    wait = [sys.executable, "-m", "cluster.wait", address, "--nodes", str(nodes), f"--timeout={START_S:g}"]
    if head.start(wait, folder / "wait.log", env).wait(START_S + 60):
        logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
        raise RuntimeError(f"Ray on {host.name} did not come up (exit code {process.poll()}):\n{logs[-4000:]}")
