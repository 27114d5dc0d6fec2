"""``vans status`` and ``vans scale`` as a second process, against a run that answers requests meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[3]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
TOKEN = {"RAY_AUTH_MODE": "token"}  # what a person sets who gives an address; a run's folder says it by itself


class Run:
    """The process of ``toy_run.py``, which holds the cluster, the pool and the requests."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log = (out / "driver.log").open("w")
        script = Path(__file__).with_name("toy_run.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(out)], env=ENV, stdout=self.log, stderr=subprocess.STDOUT
        )

    def record(self) -> dict[str, str]:
        file = self.out / "control.json"
        found: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {"state": "starting"}
        return found

    def processed(self) -> int:
        return len((self.out / "processed").read_text().splitlines())

    def wait_for(self, condition: Callable[[], Any], seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, (self.out / "driver.log").read_text()
            assert time.monotonic() < deadline, (self.out / "driver.log").read_text()
            time.sleep(0.1)

    def vans(self, *words: str, code: int = 0, env: dict[str, str] | None = None) -> str:
        """Run the command line in a process of its own; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            env=ENV | (env or {}),
            cwd=self.out,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        return done.stdout + done.stderr

    def pool(self) -> dict[str, Any]:
        """Return the pool from ``vans status --json``."""
        found: dict[str, Any] = json.loads(self.vans("status", str(self.out), "--json"))["pools"][0]
        return found

    def end(self) -> None:
        (self.out / "stop").touch()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("run"))
    try:
        run.wait_for(lambda: run.record()["state"] == "running" and (run.out / "processed").exists())
        yield run
        run.end()
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(timeout=30)


def test_sizes_change_while_requests_run_and_a_worker_without_room_stops_nobody(run: Run) -> None:
    text = run.vans("scale", str(run.out), "toy=1")
    assert text == "toy: 2 → 1 workers\n"
    # Slot 1 is taken again in its bundle, one of the others gets the cluster's last slot, two wait for room.
    text = run.vans("scale", str(run.out), "toy=5")
    assert re.fullmatch(
        r"toy: 1 → 5 workers; \d wait for room in the cluster \(free: nothing\)\. The others go on serving\.\n", text
    )
    pool = run.pool()
    states = {worker["name"]: worker["state"] for worker in pool["workers"]}
    assert states["toy-0"] == "ready" and [states[f"toy-{slot}"] for slot in (2, 3, 4)].count("no room") == 2
    assert set(states) == {"toy-0", "toy-1.2", "toy-2", "toy-3", "toy-4"}
    assert pool["figures"]["target"] == 5 and pool["figures"]["version"] == 7
    assert pool["figures"]["requests_per_min"] > 0 and 0 < pool["figures"]["oldest_wait_s"] < 30
    assert pool["workers"][0]["node"] == "127.0.0.1" and pool["workers"][0]["version"] == 7
    before = run.processed()
    run.wait_for(lambda: run.processed() > before + 5)
    text = run.vans("scale", str(run.out), "toy=3")
    assert text == "toy: 5 → 3 workers\n"


def test_status_survives_its_board_and_what_is_wrong_is_one_line(run: Run) -> None:
    kill = """
import sys, ray
from actors.control import boards, find_board
from cluster.session import join
with join(sys.argv[1]):
    ray.kill(find_board(boards()["toy-run"][0]))
"""
    subprocess.run([sys.executable, "-c", kill, run.record()["address"]], env=ENV | TOKEN, check=True, timeout=60)
    run.wait_for(lambda: "the board failed" in (run.out / "driver.log").read_text())
    error = run.vans(
        "scale", "toy-run", "artist=2", "--address", run.record()["address"], code=2, env=TOKEN
    )  # by name; a new board
    assert error == "error: no pool artist; the run's pools are toy, auto\n"
    text = run.vans("status", str(run.out))
    assert re.search(r"toy +\d of 3 +v7", text) and re.search(r"toy-0 +ready +127.0.0.1 +v7", text)
    assert (run.out / "driver.log").read_text().count("the board failed") == 1


def test_nothing_was_lost_or_done_twice_and_an_ended_run_says_so(run: Run) -> None:
    run.end()
    assert run.process.returncode == 0, (run.out / "driver.log").read_text()
    found = json.loads((run.out / "answers.json").read_text())
    answers = {int(n): tuple(answer) for pool in found.values() for n, answer in pool.items()}
    versions = {int(n): 7 if pool == "toy" else 0 for pool in found for n in found[pool]}
    assert answers == {n: (n * n, versions[n]) for n in range(len(answers))} and len(found["toy"]) > 50
    worked = Counter(int(line.split()[0]) for line in (run.out / "processed").read_text().splitlines())
    assert worked == dict.fromkeys(answers, 1)
    metrics = (run.out / "metrics.txt").read_text()
    for name in ("_workers{", "_queue_len{", "_done_total{", "_queue_wait_s_bucket{", "_service_s_sum{"):
        assert f"ray_vans_pool{name}" in metrics
    # Ray hands metrics on every few seconds, so the size before the last one may still stand there.
    assert re.search(r'ray_vans_pool_target\{.*pool="toy".*run="toy-run".*\} [35]\.0', metrics)
    lines = [json.loads(line)["pools"] for line in (run.out / "pools.jsonl").read_text().splitlines()]
    assert {1, 3, 5} <= {line["toy"]["target"] for line in lines}
    sizes = [line["auto"]["target"] for line in lines]  # the autoscaler grew it, and then left it alone
    assert sizes == sorted(sizes) and set(sizes) == {1, 2}
    error = run.vans("status", str(run.out), code=2)
    assert re.fullmatch(r"error: run toy-run in \S+ has ended: \S+\n", error)
