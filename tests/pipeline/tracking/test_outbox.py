"""The outbox loses no record and holds nobody up, whether the store is away, slow or hanging."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.tracking.outbox import Outbox, Record, Unreachable

pytestmark = pytest.mark.slow


class Store:
    """Takes records while ``up``; ``held`` makes it hang instead."""

    def __init__(self) -> None:
        self.up, self.taken = True, []
        self.held = threading.Event()
        self.held.set()

    def deliver(self, record: Record) -> None:
        self.held.wait(20)
        if not self.up:
            raise Unreachable("connection refused")
        if record["n"] == "bad":
            raise ValueError("no such metric")
        self.taken.append(record["n"])


def put(outbox: Outbox, numbers: range) -> None:
    for n in numbers:
        outbox.put({"n": n})


def test_outage_is_bridged_in_order(tmp_path: Path) -> None:
    store = Store()
    outbox = Outbox(store.deliver, tmp_path / "spool.jsonl", retry_s=0.1)
    put(outbox, range(5))
    assert outbox.flush(5)
    store.up = False
    put(outbox, range(5, 50))
    assert outbox.flush(5)
    assert outbox.counts.spooled == 45
    store.up = True
    put(outbox, range(50, 60))
    assert outbox.close(5) == 0
    assert store.taken == list(range(60))
    assert not (tmp_path / "spool.jsonl").exists()


def test_spool_is_delivered_without_new_records_once_the_store_is_back(tmp_path: Path) -> None:
    store = Store()
    outbox = Outbox(store.deliver, tmp_path / "spool.jsonl", retry_s=0.05)
    store.up = False
    put(outbox, range(3))
    outbox.flush(5)
    store.up = True
    deadline = time.monotonic() + 5
    while store.taken != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.taken == [0, 1, 2]
    outbox.close(5)


def test_what_is_left_at_the_end_is_delivered_by_the_next_process(tmp_path: Path) -> None:
    store = Store()
    store.up = False
    first = Outbox(store.deliver, tmp_path / "spool.jsonl")
    put(first, range(4))
    assert first.close(5) == 4
    with (tmp_path / "spool.jsonl").open("a") as file:
        file.write('{"n": 99')  # a killed process leaves a part of a line
    store.up = True
    second = Outbox(store.deliver, tmp_path / "spool.jsonl")
    put(second, range(4, 6))
    assert second.close(5) == 0
    assert store.taken == list(range(6))


def test_hanging_store_holds_nobody_up(tmp_path: Path) -> None:
    store = Store()
    store.held.clear()
    outbox = Outbox(store.deliver, tmp_path / "spool.jsonl")
    started = time.perf_counter()
    put(outbox, range(1000))
    assert time.perf_counter() - started < 0.5
    assert outbox.close(0.3) == 1000
    assert len((tmp_path / "spool.jsonl").read_text().splitlines()) == 1000
    store.held.set()


def test_refused_record_is_kept_apart_and_the_rest_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    outbox = Outbox(store.deliver, tmp_path / "spool.jsonl")
    outbox.put({"n": 1})
    outbox.put({"n": "bad"})
    outbox.put({"n": 2}, prepare=lambda: (tmp_path / "nowhere" / "x").write_text("x"))
    outbox.put({"n": 3})
    assert outbox.close(5) == 0
    assert store.taken == [1, 3]
    rejects = (tmp_path / "spool_rejected.jsonl").read_text()
    assert "no such metric" in rejects and "FileNotFoundError" in rejects
    assert outbox.counts.rejected == 2
    assert "refused" in caplog.text


def test_full_disk_under_the_spool_keeps_the_records_in_order(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own: the kernel refuses the spool's growth with EFBIG, as it would a full disk."""
    script = """
import json, resource, sys, time
from pathlib import Path
from pipeline.tracking.outbox import Outbox, Unreachable
up, taken = [False], []
def deliver(record):
    if not up[0]:
        raise Unreachable("away")
    taken.append(record["n"])
outbox = Outbox(deliver, Path(sys.argv[1]) / "spool.jsonl", retry_s=0.05)
for n in range(3):
    outbox.put({"n": n})
assert outbox.flush(10)
resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))
for n in range(3, 60):
    outbox.put({"n": n})
assert outbox.flush(10)
spooled = outbox.counts.spooled
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
up[0] = True
left = outbox.close(10)
print(json.dumps([spooled, left, taken == list(range(60))]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    spooled, left, in_order = json.loads(done.stdout)
    assert spooled < 60 and left == 0 and in_order
    assert "cannot be written" in done.stderr
