"""What the terminal of a driver shows when a node of its cluster is killed, and when the user's code raises."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import kill

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("ray_alone")]

DRIVER = """
import sys, time
import ray
from cluster import notices
from cluster.session import connect, logs_folder

heard, plain = [], notices.notice
def hear(text, folder):
    heard.append(text)
    return plain(text, folder)
notices.notice = hear

@ray.remote(resources={"far": 1}, num_cpus=0)
class Far:
    def pid(self):
        print("a worker's word")
        return 1

@ray.remote(num_cpus=0)
def broken():
    raise ValueError("of the user's code")

with connect(sys.argv[1]):
    far = Far.remote()
    ray.get(far.pid.remote(), timeout=60)
    print("logs", logs_folder(), flush=True)
    deadline = time.monotonic() + 90
    while sum(text.startswith(("Raylet is terminated.", "The node with")) for text in heard) < 2:
        assert time.monotonic() < deadline, heard
        time.sleep(0.1)
    print("heard", any("state-dump" in text or "(raylet)" in text for text in heard), flush=True)
    ray.get(broken.remote(), timeout=60)
"""


@pytest.fixture
def driver(ray_alone: None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A driver in a cluster of two nodes, in a process of its own; gives it and the pid of the second node's raylet."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
    far = cluster.add_node(num_cpus=1, resources={"far": 1}, **store)
    try:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield driver, far.all_processes["raylet"][0].process.pid
        finally:
            kill(driver)
    finally:
        cluster.shutdown()


def test_a_killed_node_is_one_line_with_the_folder_of_the_logs_and_an_error_of_the_users_code_is_seen(
    driver: tuple[subprocess.Popen[str], int],
) -> None:
    process, raylet = driver
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("logs /"), first
    os.kill(raylet, signal.SIGKILL)
    out, err = process.communicate(timeout=150)
    assert out == "heard True\n"  # the dump came to the driver, and is not shown
    warning, _, rest = err.partition("\n")
    folder = first.split()[1]
    assert re.fullmatch(
        rf"Ray has lost the node [\d.]+: its raylet has ended, .* Ray's logs, {folder} on that node and on the head",
        warning,
    ), err
    assert Path(folder, "raylet.out").is_file()
    assert "state-dump" not in err and "(raylet)" not in err and "a worker's word" not in out + err
    assert rest.startswith("Traceback") and "ValueError: of the user's code" in rest
    assert process.returncode == 1
