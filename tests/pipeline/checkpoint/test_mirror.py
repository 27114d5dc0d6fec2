"""A mirror holds checkpoints whole or not at all, restores only what its manifest says, and never costs the run.

These use a folder as the store (``file://``); ``test_mirror_s3.py`` has a real S3 server.
"""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import CheckpointError, CheckpointWriteError, ConfigError, StorageError
from pipeline.checkpoint import CheckpointStore, Mirror, TrainState, Uploads, newest_of_both, uploads
from pipeline.checkpoint.mirror import ChangedError
from pipeline.checkpoint.uploads import uploads_to
from pipeline.support.location import parse_location


def write(store: CheckpointStore, stage: str, step: int, content: bytes = b"weights") -> Path:
    with store.write(stage, step, TrainState(stage, step)) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "rank 0.bin").write_bytes(content * 100)
    return store.root / f"{stage}-step{step:06d}"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def mirror(there: Path) -> Mirror:
    return Mirror(parse_location(f"file://{there}"), keep=2)


def elsewhere(tmp_path: Path) -> CheckpointStore:
    """The store of a machine that has nothing."""
    return CheckpointStore(tmp_path / "new" / "checkpoints")


def nothing() -> None:
    """No deadline."""


def names(mirror: Mirror) -> list[str]:
    return [stored.name for stored in mirror.checkpoints()]


def test_what_was_sent_comes_back_whole_with_the_exports(
    tmp_path: Path, store: CheckpointStore, mirror: Mirror
) -> None:
    adapter = tmp_path / "run" / "vlm_adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    mirror.send_export(adapter, nothing)
    for step in (1, 2, 3):
        mirror.send(write(store, "stage1", step), nothing)
    mirror.send(write(store, "stage2", 1), nothing)
    assert names(mirror) == ["stage2-step000001", "stage1-step000003", "stage1-step000002"]
    new = elsewhere(tmp_path)
    found = newest_of_both(new, mirror, ["vlm_adapter", "vdm_adapter"])
    assert found is not None and found.path == new.root / "stage2-step000001" and found.state.stage == "stage2"
    assert (found.path / "learner" / "rank 0.bin").read_bytes() == b"weights" * 100
    restored = tmp_path / "new" / "vlm_adapter"
    assert {p.name: p.read_bytes() for p in restored.iterdir()} == {"adapter_model.safetensors": b"adapter"}
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["checkpoints", "vlm_adapter"]


def test_a_half_uploaded_one_is_ignored_and_cleared(
    tmp_path: Path, store: CheckpointStore, mirror: Mirror, there: Path
) -> None:
    mirror.send(write(store, "stage1", 1), nothing)
    calls = iter([None, None])

    def killed() -> None:
        try:
            next(calls)
        except StopIteration:
            raise KeyboardInterrupt from None

    half = write(store, "stage1", 2)
    with pytest.raises(KeyboardInterrupt):
        mirror.send(half, killed)
    assert (there / "checkpoints" / half.name).is_dir() and names(mirror) == ["stage1-step000001"]
    found = newest_of_both(elsewhere(tmp_path), mirror, [])
    assert found is not None and found.step == 1
    mirror.send(write(store, "stage1", 3), nothing)
    assert sorted(p.name for p in (there / "checkpoints").iterdir()) == ["stage1-step000001", "stage1-step000003"]


def test_damage_in_the_mirror_is_found_and_the_one_before_restored(
    tmp_path: Path, store: CheckpointStore, mirror: Mirror, there: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        mirror.send(write(store, "stage1", step), nothing)
    damaged = there / "checkpoints" / "stage1-step000002" / "learner" / "rank 0.bin"
    damaged.write_bytes(b"Weights" * 100)
    found = newest_of_both(elsewhere(tmp_path), mirror, [])
    assert found is not None and found.step == 1 and "SHA-256" in caplog.text
    (there / "checkpoints" / "stage1-step000001" / "train_state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)no checkpoint of .* can be used.*SHA-256.*train_state\.json is missing"
    ):
        newest_of_both(CheckpointStore(tmp_path / "newer" / "checkpoints"), mirror, [])
    assert not list((tmp_path / "newer" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../b", "x\\y"])
def test_a_manifest_cannot_name_what_lies_outside(
    tmp_path: Path, store: CheckpointStore, mirror: Mirror, there: Path, name: str
) -> None:
    mirror.send(write(store, "stage1", 1), nothing)
    manifest = there / "checkpoints" / "stage1-step000001" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["files"][name] = values["files"].pop("train_state.json")
    manifest.write_text(json.dumps(values))
    assert newest_of_both(elsewhere(tmp_path), mirror, []) is None
    assert not (tmp_path / "escaped").exists()


def test_the_newer_of_both_continues(tmp_path: Path, store: CheckpointStore, mirror: Mirror) -> None:
    mirror.send(write(store, "stage1", 1), nothing)
    write(store, "stage1", 2)
    found = newest_of_both(store, mirror, [])
    assert found is not None and found.step == 2  # not sent, and newer
    old = elsewhere(tmp_path)
    assert newest_of_both(old, mirror, []) is not None
    mirror.send(store.root / "stage1-step000002", nothing)
    found = newest_of_both(old, mirror, [])
    assert found is not None and (found.step, found.path.parent) == (2, old.root)
    assert [p.name for p in old.paths()] == ["stage1-step000002", "stage1-step000001"]


def test_a_mirror_is_one_runs(store: CheckpointStore, mirror: Mirror) -> None:
    mirror.require_unused()
    mirror.describe("name: x\n")
    mirror.require_unused()
    mirror.send(write(store, "stage1", 1), nothing)
    with pytest.raises(ConfigError, match=r"already holds a run; continue it with --resume"):
        mirror.require_unused()


def test_a_checkpoint_that_changes_while_it_is_sent_is_not_taken(store: CheckpointStore, mirror: Mirror) -> None:
    path = write(store, "stage1", 1)
    (path / "learner" / "rank 0.bin").write_bytes(b"other")
    with pytest.raises(ChangedError, match="SHA-256"):
        mirror.send(path, nothing)
    assert names(mirror) == []
    mirror.send(write(store, "stage1", 1), nothing)  # written again: another manifest
    mirror.send(store.root / "stage1-step000001", nothing)
    assert names(mirror) == ["stage1-step000001"]


# --- uploads ----------------------------------------------------------------------------------------------------------


def settle(sent: Uploads) -> None:
    deadline = time.monotonic() + 60
    while not sent.idle:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_failures_are_counted_and_what_could_not_be_sent_goes_with_the_next(
    monkeypatch: pytest.MonkeyPatch, store: CheckpointStore, mirror: Mirror, there: Path
) -> None:
    monkeypatch.setattr(uploads, "PAUSES_S", (0.01,))
    there.write_text("a file where the folder has to be")
    adapter = store.root.parent / "vlm_adapter"
    adapter.mkdir(parents=True)
    (adapter / "config.json").write_text("{}")
    sent = Uploads(mirror, limit=3)
    sent.offer(write(store, "stage1", 1))
    settle(sent)
    (line,) = sent.news()
    assert "stage1-step000001 could not be sent to the mirror" in line and "The run goes on" in line
    assert sent.news() == [] and (sent.total, sent.in_a_row) == (1, 1)
    sent.offer_export(adapter)
    settle(sent)
    (line,) = sent.news()
    assert "vlm_adapter could not be sent" in line and sent.in_a_row == 2
    there.unlink()
    sent.offer(write(store, "stage1", 3))
    settle(sent)
    assert (sent.total, sent.in_a_row) == (2, 0) and sent.newest.endswith("checkpoints/stage1-step000003")
    assert names(mirror) == ["stage1-step000003"] and (there / "vlm_adapter" / "config.json").is_file()
    assert sent.finish() is None and not sent.in_use


def test_too_many_failures_in_a_row_stop_the_run_and_the_end_tries_once_more(
    monkeypatch: pytest.MonkeyPatch, store: CheckpointStore, mirror: Mirror, there: Path
) -> None:
    monkeypatch.setattr(uploads, "PAUSES_S", ())
    there.write_text("a file")
    paper = io.StringIO()
    with pytest.raises(
        CheckpointWriteError, match=r"(?s)that makes 2 in a row \(checkpoint\.max_failures=2\).*--resume.*=null"
    ):
        with uploads_to(mirror, 2, 60.0, Console(file=paper, width=400)) as sent:
            for step in (1, 2):
                sent.offer(write(store, "stage1", step))
                settle(sent)
            sent.news()
    assert "is not complete: stage1-step000002 could not be sent" in paper.getvalue()
    with pytest.raises(CheckpointWriteError, match=r"(?s)is not complete.*--resume sends the rest"):
        with uploads_to(mirror, 9, 60.0, Console(file=paper)) as sent:
            sent.offer(store.root / "stage1-step000002")
    there.unlink()
    with uploads_to(mirror, 9, 60.0, Console(file=paper)) as sent:
        sent.offer(store.root / "stage1-step000002")
    assert names(mirror) == ["stage1-step000002"]


def test_the_newest_goes_first_and_what_is_being_sent_is_not_pruned(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()
    send = Mirror.send

    def slow(self: Mirror, path: Path, check: object) -> None:
        started.set()
        assert go.wait(60)
        send(self, path, check)  # type: ignore[arg-type]

    monkeypatch.setattr(Mirror, "send", slow)
    sent = Uploads(mirror)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1, in_use=sent.in_use)
    sent.offer(write(store, "stage1", 1))
    assert started.wait(60)
    for step in (2, 3):
        sent.offer(write(store, "stage1", step))
    assert [p.name[-1] for p in store.paths()] == ["3", "1"]
    go.set()
    assert sent.finish() is None and names(mirror) == ["stage1-step000003", "stage1-step000001"]
    write(store, "stage1", 4)
    assert [p.name[-1] for p in store.paths()] == ["4"]


def test_an_upload_that_never_ends_is_told_and_does_not_keep_the_run(
    mirror: Mirror, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(Mirror, "send", lambda self, path, check: go.wait(60))
    sent = Uploads(mirror, limit=2, timeout_s=0.2)
    sent.offer(write(store, "stage1", 1))
    time.sleep(0.3)
    (line,) = sent.news()
    assert "has not ended within checkpoint.mirror_timeout_s=0.2" in line and sent.news() == []
    for step in (2, 3):
        sent.offer(write(store, "stage1", step))
    with pytest.raises(CheckpointWriteError, match="2 in a row"):
        sent.news()
    assert "has not ended" in str(sent.finish())
    go.set()


def test_a_deadline_ends_a_slow_upload_between_two_chunks(mirror: Mirror, store: CheckpointStore) -> None:
    sent = Uploads(mirror, timeout_s=-1.0)
    sent.offer(write(store, "stage1", 1))
    settle(sent)
    assert "took longer than checkpoint.mirror_timeout_s" in " ".join(sent.news()) and names(mirror) == []


def test_without_a_mirror_nothing_is_sent(tmp_path: Path) -> None:
    with uploads_to(None, 3, 60.0, Console(file=io.StringIO())) as sent:
        sent.offer(tmp_path)
        sent.offer_export(tmp_path)
        assert sent.idle and sent.news() == []


def test_a_store_that_cannot_be_written_to_is_told_at_the_start(there: Path, mirror: Mirror) -> None:
    there.write_text("a file")
    with pytest.raises(StorageError, match=r"^checkpoint\.mirror: file:.*there"):
        mirror.describe("name: x\n")
