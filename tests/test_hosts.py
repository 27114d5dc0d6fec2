"""Hosts made of namespaces: what they see of each other, a link that is cut, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.hosts import Host, hosts, missing

LISTEN = "import socket; s = socket.create_server(('', 5000))\nwhile True: s.accept()[0].sendall(socket.gethostname().encode())"
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 5000), 2).recv(99).decode())"


@pytest.fixture(autouse=True)
def _possible() -> None:
    if (why := missing()) is not None:
        pytest.skip(why)


def ask(asking: Host, asked: Host, log: Path) -> str:
    """Return what ``asking`` hears from ``asked``; the last line of an error where it hears nothing."""
    log.unlink(missing_ok=True)
    asking.start([sys.executable, "-c", ASK, asked.address], log, os.environ).wait(20)
    return log.read_text().strip().splitlines()[-1]


def names() -> str:
    done = [
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True) for words in (["netns"], ["link"])
    ]
    return "".join(each.stdout for each in done)


def test_hosts_reach_each_other_by_address_until_a_link_is_cut_and_leave_nothing_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ZeroDivisionError), hosts(2) as (one, two):
        listener = two.start([sys.executable, "-c", LISTEN], tmp_path / "listener", os.environ)
        while ask(one, two, log) != two.name:
            assert listener.poll() is None
        assert two.runs("create_server") and not one.runs("create_server")
        two.cut()
        assert "timed out" in ask(one, two, log) or "No route" in log.read_text()
        two.mend()
        while ask(one, two, log) != two.name:
            assert listener.poll() is None
        raise ZeroDivisionError
    assert listener.wait(10) and not psutil.pid_exists(listener.pid)
    assert f"vans{os.getpid() % 100_000}" not in names()
