"""One process at a time holds a folder, whatever became of the one before; real processes, killed and stopped for real."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError
from pipeline.checkpoint import CheckpointStore
from pipeline.cli import app
from pipeline.lock import LOCK, InUseError, LockLostError, held, hold, hold_all, holding, require_token, slots
from pipeline.lock.owner import Owner
from pipeline.lock.slots import FolderSlot, StoreSlot
from pipeline.support.location import Uri

pytestmark = pytest.mark.slow

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.lock import hold
with hold(Path(sys.argv[1]), "vans train"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def holder(folder: Path, seconds: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Hold ``folder`` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the waits short; a beat is still several times shorter than the time after which a lock is stale."""
    for name, seconds in (("BEAT_S", 0.1), ("STALE_S", 0.8), ("POLL_S", 0.05)):
        monkeypatch.setattr(holding, name, seconds)
    monkeypatch.setattr(slots, "REPLACE_SETTLE_S", 0.05)
    monkeypatch.setattr(slots, "SETTLE_S", 0.3)


def elsewhere(**more: Any) -> Owner:
    """Return an owner on another machine."""
    return dataclasses.replace(Owner.here("vans train"), host="elsewhere", **more)


def test_a_living_owner_is_named_and_keeps_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        before = (tmp_path / LOCK).read_bytes()
        with pytest.raises(InUseError) as error, hold(tmp_path, "vans sft", name="out=here"):
            raise AssertionError("held twice")
        owner = Owner.parse(before)
        for told in (
            "out=here is in use",
            "vans train",
            owner.host,
            f"process {process.pid}",
            owner.since,
            owner.beat,
            "remove",
            LOCK,
        ):
            assert told in str(error.value)
        process.send_signal(signal.SIGSTOP)  # a stopped process lives
        with pytest.raises(InUseError), hold(tmp_path, "vans sft"):
            raise AssertionError("held twice")
        process.send_signal(signal.SIGCONT)


def test_a_killed_owner_is_recognised_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        told: list[str] = []
        for _ in range(2):  # not waited for yet: a zombie; then gone
            with hold(tmp_path, "vans train", tell=told.append) as lock:
                assert Owner.parse((tmp_path / LOCK).read_bytes()).token == lock.owner.token
            process.wait()
    assert len(told) == 1
    assert f"process {process.pid}" in told[0]
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_owner_s_number_is_not_the_owner(tmp_path: Path) -> None:
    other = dataclasses.replace(Owner.here("vans train"), pid=os.getppid(), started="1")
    (tmp_path / LOCK).write_bytes(other.content())
    with hold(tmp_path, "vans train") as lock:
        assert Owner.parse((tmp_path / LOCK).read_bytes()).token == lock.owner.token != other.token


def test_sigterm_gives_the_lock_back_and_ends_the_process_as_ever(tmp_path: Path) -> None:
    with holder(tmp_path / "made" / "here") as process:
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
        assert not (tmp_path / "made" / "here" / LOCK).exists()


def test_an_error_gives_the_lock_back_and_an_empty_folder_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a" / "b", "vans train"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a", "vans train"):
        (tmp_path / "a" / "config.yaml").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.yaml"]


def test_a_block_inside_another_shares_its_lock(tmp_path: Path) -> None:
    with hold(tmp_path, "vans demo") as outer:
        with hold(tmp_path / ".." / tmp_path.name, "vans train") as inner:
            assert inner is outer
        assert held(tmp_path) is outer
        assert (tmp_path / LOCK).is_file()
    assert held(tmp_path) is None
    assert not (tmp_path / LOCK).exists()


@pytest.mark.usefixtures("short")
def test_a_lock_of_another_machine_without_a_sign_of_life_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(elsewhere().content())
    told: list[str] = []
    with hold(tmp_path, "vans train", tell=told.append) as lock:
        lock.require()
    assert "waiting" in told[0] and "elsewhere" in told[0]
    assert "taken over from vans train on elsewhere" in told[1]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"pids": "pid:[1]"}, {"boot": "another"}])
def test_a_lock_with_signs_of_life_is_its_owner_s_on_another_machine_or_in_another_container(
    tmp_path: Path, other: dict
) -> None:
    slot, owner, ended = (
        FolderSlot(tmp_path),
        dataclasses.replace(Owner.here("vans train"), pid=2**22 + 1, **other),
        threading.Event(),
    )
    assert slot.create(owner.content())

    def beat() -> None:
        shown = owner
        while not ended.wait(0.1):
            shown = shown.after_a_beat()
            slot.overwrite(shown.content())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InUseError, match=f"process {owner.pid}"), hold(tmp_path, "vans train"):
            raise AssertionError("held twice")
    finally:
        ended.set()
        thread.join()
        slot.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff"])
def test_a_damaged_lock_is_one_of_which_nothing_is_known(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with hold(tmp_path, "vans train") as lock:
        lock.require()
        assert Owner.parse((tmp_path / LOCK).read_bytes()).token == lock.owner.token


def test_beats_overwrite_the_note_in_place_with_the_same_length() -> None:
    owner = Owner.here("vans train")
    later = dataclasses.replace(owner.after_a_beat(), beats=10**9)
    assert len(later.content()) == len(owner.content())
    assert Owner.parse(later.content()) == later
    assert owner.liveness() == "alive"


@pytest.mark.usefixtures("short")
def test_who_was_taken_over_writes_no_checkpoint_and_leaves_the_new_lock(tmp_path: Path) -> None:
    new = elsewhere(what="vans train, the second")
    store = tmp_path / "checkpoints"
    with hold_all({f"out={tmp_path}": tmp_path}, "vans train") as require:
        checkpoints = CheckpointStore(store, require_owned=require)
        with checkpoints.write("stage1", 1) as folder:
            (folder / "a").write_text("a")
        half = checkpoints.write("stage1", 2)
        folder = half.__enter__()
        (tmp_path / "beside").write_bytes(new.content())
        (tmp_path / "beside").replace(tmp_path / LOCK)
        (store / ".writing-other-stage1-step000003").mkdir()
        for _ in range(2):
            with pytest.raises(LockLostError, match="taken over by vans train, the second on elsewhere"):
                half.__exit__(None, None, None) if folder.exists() else checkpoints.write("stage1", 3).__enter__()
        time.sleep(0.3)  # the old owner's beats do not reach the new lock
        assert Owner.parse((tmp_path / LOCK).read_bytes()) == new
    assert sorted(path.name for path in store.iterdir()) == [".writing-other-stage1-step000003", "stage1-step000001"]
    assert Owner.parse((tmp_path / LOCK).read_bytes()) == new
    require_token(tmp_path, new.token)
    with pytest.raises(LockLostError, match="the second"):
        require_token(tmp_path, "another")


@pytest.mark.usefixtures("short")
def test_a_lock_that_was_removed_by_hand_is_written_again_unless_somebody_came(tmp_path: Path) -> None:
    with hold(tmp_path, "vans train") as lock:
        (tmp_path / LOCK).unlink()
        lock.require()
        assert Owner.parse((tmp_path / LOCK).read_bytes()).token == lock.owner.token


@pytest.mark.usefixtures("short")
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with hold(tmp_path, "vans train"):
        slot = FolderSlot(tmp_path)
        assert not slot.create(elsewhere().content())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out=x cannot be written to: Not a directory; .* choose another folder"):
        with hold(tmp_path / "file" / "run", "vans train", name="out=x"):
            raise AssertionError("held")


def test_a_queued_job_waits_for_the_one_before_it(tmp_path: Path) -> None:
    told: list[str] = []
    with holder(tmp_path, seconds=1.0) as process:
        with hold(tmp_path, "vans train", wait_s=30.0, tell=told.append):
            pass
        assert process.wait(10) == 0
    assert len(told) == 1 and "waiting 30 s at most" in told[0]


# --- starters at the same instant ------------------------------------------------------------------------------------


def _race(place: Callable[[int], Any], rounds: int, barrier: Any, results: Any) -> None:
    for number in range(rounds):
        barrier.wait(60)
        try:
            with hold(place(number), "vans train") as lock:
                barrier.wait(60)  # everybody has tried
                lock.require()
                results.put((number, "won"))
                barrier.wait(60)
        except InUseError:
            barrier.wait(60)
            results.put((number, "lost"))
            barrier.wait(60)


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, number: int) -> Path:
        return self.root / str(number)


def test_of_starters_at_the_same_instant_one_wins_with_and_without_a_dead_owner(tmp_path: Path) -> None:
    starters, rounds = 4, 12
    dead = dataclasses.replace(Owner.here("vans train"), pid=2**22 + 1)  # above Linux's largest
    for number in range(0, rounds, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / LOCK).write_bytes(dead.content())
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(starters), context.Queue()
    processes = [
        context.Process(target=_race, args=(_Folder(tmp_path), rounds, barrier, results)) for _ in range(starters)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in range(starters * rounds)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for number in range(rounds):
        assert [what for n, what in found if n == number].count("won") == 1, number


@pytest.mark.usefixtures("short")
def test_of_two_that_come_to_a_store_at_the_same_instant_one_has_it(tmp_path: Path) -> None:
    place, owners = Uri(f"file://{tmp_path}"), [Owner.here("a"), Owner.here("b")]
    together, won = threading.Barrier(2), []

    def come(owner: Owner) -> None:
        slot = StoreSlot(place)
        found = slot.read()
        together.wait()
        if found is None and slot._write_and_look(owner.content()):
            won.append(owner.token)

    threads = [threading.Thread(target=come, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert Owner.parse((tmp_path / LOCK).read_bytes()).token == won[0]
    assert not StoreSlot(place).create(Owner.here("c").content())


@pytest.mark.usefixtures("short")
def test_a_mirror_is_held_by_a_path_and_by_the_uri_of_that_path_alike(tmp_path: Path) -> None:
    with hold(Uri(f"file://{tmp_path}"), "vans train") as lock:
        with hold(tmp_path, "vans train") as same:
            assert same is lock
        assert (tmp_path / LOCK).is_file()
    with holder(tmp_path), pytest.raises(InUseError), hold(Uri(f"file://{tmp_path}"), "vans train"):
        raise AssertionError("held twice")


# --- every command that writes into a folder over time ----------------------------------------------------------------


def test_every_command_leaves_a_folder_alone_that_is_another_s(tmp_path: Path, toy_shards: Path) -> None:
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    data = (f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test")
    elsewhere_ = (f"out={tmp_path}/other", f"checkpoint.mirror={mirror}")
    with holder(out), holder(mirror):
        (out / "config.yaml").write_text("name: x\n")
        before = sorted(path.name for path in out.iterdir())
        for arguments in (
            ("train", "toy", f"out={out}", *data),
            ("train", "toy", *elsewhere_, *data),
            ("demo", "--quick", "--out", str(out)),
            ("sft", "vlm", "toy", "--data", f"{toy_shards}/train", "--out", str(out)),
            ("evaluate", "toy", "--out", str(out), *data),
            ("reproduce", "--quick", "--out", str(out)),
            ("pretrain", "--out", str(out)),
        ):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 2, (arguments, result.output)
            assert "is in use by vans train" in result.output, arguments
            assert sorted(path.name for path in out.iterdir()) == before, arguments
    assert not (tmp_path / "other").exists()
