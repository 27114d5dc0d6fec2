"""Checkpoints survive a killed writer and a damaged disk, and refuse to continue another run."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, ConfigError
from pipeline.checkpoint import CheckpointStore, TrainState, require_same_config
from pipeline.config import parse_config


def write(store: CheckpointStore, stage: str, step: int, content: bytes = b"weights") -> Path:
    with store.write(stage, step, TrainState(stage, step)) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "rank0.bin").write_bytes(content * 100)
    return store.root / f"{stage}-step{step:06d}"


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = TrainState.of(
        parse_config({}),
        "stage2",
        7,
        cursor={"epoch": 1, "position": 12},
        extra={"numpy": {"state": 2**127, "inc": 3}},
        mlflow_run_ids={"parent": "abc", "stage2": "def"},
    )
    with store.write("stage2", 7, state):
        pass
    latest = store.latest()
    assert latest is not None and (latest.stage, latest.step) == ("stage2", 7)
    assert latest.state == state


def test_an_older_state_with_a_window_is_read_without_it(tmp_path: Path) -> None:
    """The SDE window follows from the step and the configuration; checkpoints that kept it as well go on."""
    state = TrainState.of(parse_config({}), "stage2", 7, cursor={"epoch": 1, "position": 12})
    path = state.save(tmp_path)
    window = {"kind": "random", "first": 0, "last": 4, "size": 2, "every": 1, "seed": 0, "step": 7}
    old = json.loads(path.read_text()) | {"window": window, "format": 1}
    path.write_text(json.dumps(old))
    assert TrainState.read(tmp_path) == dataclasses.replace(state, format=1)
    state.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"windows": window}))
    with pytest.raises(CheckpointError, match="expected the keys"):
        TrainState.read(tmp_path)


def test_newest_is_by_time_of_writing_over_stages(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    write(store, "stage1", 100)
    write(store, "stage2", 5)
    latest, stage1 = store.latest(), store.latest("stage1")
    assert latest is not None and (latest.stage, latest.step) == ("stage2", 5)
    assert stage1 is not None and stage1.step == 100


def test_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(RuntimeError, match="disk"):
        with store.write("stage1", 1) as folder:
            (folder / "half.bin").write_bytes(b"x")
            raise RuntimeError("disk")
    assert list(tmp_path.iterdir()) == []


def test_writer_killed_half_way_costs_only_its_own_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "stage1", 1)
    script = (
        "import sys, time; from pipeline.checkpoint import CheckpointStore\n"
        "with CheckpointStore(sys.argv[1]).write('stage1', 2) as folder:\n"
        "    (folder / 'half.bin').write_bytes(b'x' * 1000); print('half', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    latest = store.latest()
    assert latest is not None and latest.step == 1
    assert any(path.name.startswith(".writing-") for path in tmp_path.iterdir())
    write(store, "stage1", 2)  # the next writer clears the remains
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert [store.load(path).step for path in store.paths()] == [2, 1]


def test_a_full_disk_leaves_the_checkpoint_before_and_no_remains(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse a file that grows, also in torch's own writer: what a full disk looks like."""
    script = """
import asyncio, resource, sys
import torch
from pipeline.checkpoint import CheckpointStore, TrainState, WriteFailures
store = CheckpointStore(sys.argv[1])
failures = WriteFailures(store, limit=2)

async def write(step, values):
    with store.write("stage1", step, TrainState("stage1", step)) as folder:
        torch.save(torch.zeros(values), folder / "weights.pt")

async def main():
    assert await failures.attempt(write(1, 10), "stage1 after 1 steps", last=False) is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    print(await failures.attempt(write(2, 100_000), "stage1 after 2 steps", last=False))
    await failures.attempt(write(3, 100_000), "stage1 after 3 steps", last=False)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "stage1 after 2 steps could not be written" in done.stdout and "step000001 is kept" in done.stdout, (
        done.stderr
    )
    assert done.returncode == 1 and "CheckpointWriteError" in done.stderr and "2 in a row" in done.stderr
    latest = CheckpointStore(tmp_path).latest()
    assert latest is not None and latest.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stage1-step000001"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize(
    ("damage", "message"), [(flip, "SHA-256"), (cut, "10 bytes"), (Path.unlink, "missing")], ids=["flip", "cut", "loss"]
)
def test_damage_is_found_and_the_one_before_is_used(tmp_path, caplog, damage, message) -> None:
    store = CheckpointStore(tmp_path)
    write(store, "stage1", 1)
    damaged = write(store, "stage1", 2)
    damage(damaged / "learner" / "rank0.bin")
    with pytest.raises(CheckpointError, match=message):
        store.load(damaged)
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest is not None and latest.step == 1
    assert "rank0.bin" in caplog.text
    damage(store.root / "stage1-step000001" / "learner" / "rank0.bin")
    with pytest.raises(CheckpointError, match="no checkpoint under"):
        store.latest()


def test_damaged_manifest_is_reported_and_costs_no_good_checkpoint(tmp_path, caplog) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        write(store, "stage1", step)
    (tmp_path / "stage1-step000003" / "manifest.json").write_text("{")
    latest = store.latest()
    assert latest is not None and latest.step == 2
    assert "stage1-step000003" in caplog.text
    write(store, "stage1", 4)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_replacing_a_step_keeps_one_and_survives_a_kill_between_the_renames(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first = write(store, "stage1", 3, b"old")
    write(store, "stage1", 3, b"new")
    assert (first / "learner" / "rank0.bin").read_bytes().startswith(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["stage1-step000003"]
    first.rename(tmp_path / ".replaced-stage1-step000003")  # what a kill between the two renames leaves
    write(store, "stage1", 4)
    assert [store.load(path).step for path in store.paths()] == [4, 3]


def test_prune_keeps_the_newest_of_each_stage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for stage in ("stage1", "stage2"):
        for step in (1, 2, 3):
            write(store, stage, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{stage}-step00000{step}" for stage in ("stage1", "stage2") for step in (2, 3)
    ]


def test_another_configuration_is_refused_by_key(tmp_path: Path) -> None:
    config = parse_config({"seed": 3})
    state = TrainState.of(config, "stage1", 20)
    require_same_config(state, config)
    moved = config.model_copy(update={"out": Path("elsewhere"), "name": "again"})
    require_same_config(state, moved)
    other = parse_config({"seed": 4, "stage1": {"optim": {"lr": 0.1}}})
    with pytest.raises(ConfigError) as caught:
        require_same_config(state, other)
    text = str(caught.value)
    assert "seed: 3 in the checkpoint, 4 now" in text
    assert "stage1.optim.lr" in text and "stage1.rollout" not in text


def test_a_continuation_may_differ_in_what_changes_nothing_that_is_learnt() -> None:
    """Each key is free by itself and beside another one (weights.transport was, alone)."""
    state = TrainState.of(parse_config({"weights": {"transport": "object_store"}}), "stage1", 20)
    changes = {"weights": {"join_timeout_s": 3}, "learner": {"offload": "all"}, "evaluate": {"samples": 3}}
    for name in changes:
        require_same_config(state, parse_config({name: changes[name]}))
    require_same_config(state, parse_config(changes))
    with pytest.raises(ConfigError, match=r"learner\.ranks: 2 in the checkpoint, 1 now"):
        require_same_config(state, parse_config({**changes, "learner": {"offload": "all", "ranks": 1}}))


def test_a_key_that_is_new_counts_by_its_default_and_one_that_went_not_at_all() -> None:
    config = parse_config({"stage1": {"rewards": {"weights": {"rouge_l": 1.0, "format": 0.5}}}})
    state = TrainState.of(config, "stage1", 20)
    del state.config["stage1.grpo.kl_beta"]
    state.config["stage1.grpo.of_old_times"] = 3
    require_same_config(state, config)
    with pytest.raises(ConfigError, match=r"kl_beta: not set in the checkpoint, 0\.5 now"):
        require_same_config(
            state, parse_config({"stage1": {"grpo": {"kl_beta": 0.5}, "rewards": config.stage1.rewards}})
        )
    fewer = parse_config({"stage1": {"rewards": {"weights": {"rouge_l": 1.0}}}})
    with pytest.raises(ConfigError, match=r"weights\.format: 0\.5 in the checkpoint, not set now"):
        require_same_config(state, fewer)


def test_an_older_record_is_read_without_the_fields_that_went_and_a_newer_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_state.json"
    path.write_text(json.dumps({"stage": "stage1", "step": 4, "rng": {}, "seeds": {"a": 1}}))
    assert (TrainState.read(tmp_path).step, TrainState.read(tmp_path).format) == (4, 1)
    path.write_text(json.dumps({"stage": "stage1", "step": 4, "format": 2, "config_digest": "0123"}))
    assert (TrainState.read(tmp_path).step, TrainState.read(tmp_path).format) == (4, 2)
    path.write_text(json.dumps({"stage": "stage1", "step": 4, "format": 3, "rng": {}}))
    with pytest.raises(CheckpointError, match=r"found \['rng'\] too"):
        TrainState.read(tmp_path)
    path.write_text(json.dumps({"stage": "stage1", "step": 4, "format": 99}))
    with pytest.raises(CheckpointError, match="written in format 99"):
        TrainState.read(tmp_path)


def test_folder_of_something_else_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        store.load(tmp_path / "nowhere")
    with store.write("stage1", 1):
        pass
    latest = store.latest()
    assert latest is not None
    with pytest.raises(CheckpointError, match=r"no train_state\.json"):
        _ = latest.state
