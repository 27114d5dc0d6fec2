"""A resumed run knows whether its data and its models are those that it was begun with."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from actors.learner.settings import LearnerSection
from cluster.errors import CheckpointError, ConfigError, DataError
from pipeline.checkpoint import CheckpointStore, Inputs, TrainState
from pipeline.checkpoint.inputs import SAMPLE_BYTES, WHOLE_BYTES, model_digest
from pipeline.config import RunConfig, parse_config
from pipeline.config.training import SftLoraSection, SftModelSection, SftOptimSection
from pipeline.data.source import Cursor
from pipeline.data.sources import run_inputs, training_source
from pipeline.run.start import beginning, cursor_of
from pipeline.run.train import run_training
from pipeline.sft.finetuning import SftJob, other_runs, prepare, run_name
from pipeline.sft.settings import SftSettings
from pipeline.stages.feed import FeedCursor
from tests.pipeline.data.test_schema import row, write

AT = {"epoch": 0, "position": 29, "drawn": 1}


def dataset(folder: Path, rows: int, caption: str = "c") -> Path:
    from pipeline.data.schema import ShardWriter

    shutil.rmtree(folder, ignore_errors=True)
    with ShardWriter(folder, rows_per_shard=16) as writer:
        for i in range(rows):
            writer.write(row(f"r{i}", caption=caption))
    return folder


def run(tmp_path: Path, **more: object) -> RunConfig:
    values = {"out": str(tmp_path / "run"), "data": {"train": str(tmp_path / "data"), "eval": str(tmp_path / "data")}}
    return parse_config(values | more)


def checkpoint(config: RunConfig, **changes: object) -> CheckpointStore:
    """A run's checkpoint in stage 1 after 7 steps."""
    inputs = run_inputs(config, training_source(config)).to_json()
    state = TrainState.of(config, "stage1", 7, **({"cursor": AT, "inputs": inputs} | changes))
    store = CheckpointStore(config.out / "checkpoints")
    with store.write("stage1", 7, state):
        pass
    return store


def resumed(config: RunConfig, restart_data: bool = False) -> str:
    """What a run that is resumed tells before its cluster starts."""
    return "\n".join(beginning(config, True, restart_data, None).told)


def test_the_same_data_go_on_without_a_word(tmp_path: Path) -> None:
    dataset(tmp_path / "data", 40)
    config = run(tmp_path)
    checkpoint(config)
    assert resumed(config) == ""
    assert resumed(config, restart_data=True) == "", (
        "a job that is queued again does not begin its data again and again"
    )


def test_data_that_lie_elsewhere_are_the_same_data(tmp_path: Path) -> None:
    dataset(tmp_path / "data", 40)
    config = run(tmp_path)
    checkpoint(config)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = run(tmp_path, data={"train": str(tmp_path / "moved"), "eval": str(tmp_path / "data")})
    assert resumed(moved) == ""


def changed(folder: Path, how: str) -> None:
    if how in ("80 rows", "8 rows"):
        dataset(folder, int(how.split()[0]))
    elif how == "other captions":
        dataset(folder, 40, "another caption")
    elif how == "rewritten by hand":
        path = folder / "part-00001.parquet"
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    elif how == "shards in another order":
        (folder / "part-00000.parquet").rename(folder / "part-00009.parquet")
        (folder / "_complete.json").unlink()
    elif how == "a shard more":
        write(folder.with_name("more"), "xyz")
        shutil.copy(folder.with_name("more") / "part-00000.parquet", folder / "part-00004.parquet")


@pytest.mark.parametrize(
    "how", ["80 rows", "8 rows", "other captions", "rewritten by hand", "shards in another order", "a shard more"]
)
def test_other_data_are_refused_until_they_are_begun_anew(tmp_path: Path, how: str) -> None:
    folder = dataset(tmp_path / "data", 40)
    config = run(tmp_path)
    before = run_inputs(config, training_source(config)).data
    store = checkpoint(config)
    changed(folder, how)
    with pytest.raises(DataError) as caught:
        run_training(config, resume=True, console=Console(file=io.StringIO()))
    now = run_inputs(config, training_source(config)).data
    assert before is not None and now is not None
    for told in (
        str(store.root / "stage1-step000007"),
        f"40 rows with digest {before.digest[:16]}",
        str(now),
        "--restart-data",
    ):
        assert told in str(caught.value)
    assert f"the data begin anew at {store.root}/stage1-step000007: {before} → {now}" in resumed(
        config, restart_data=True
    )


def test_a_fresh_beginning_is_at_row_0_is_noted_and_holds_for_earlier_checkpoints_too(tmp_path: Path) -> None:
    from pipeline.checkpoint import compare_inputs

    config = run(tmp_path)
    dataset(tmp_path / "data", 40)
    old = run_inputs(config, training_source(config))
    dataset(tmp_path / "data", 8)
    new = run_inputs(config, training_source(config))
    inputs, told = compare_inputs(old, new, AT, where="here", restart_data=True)
    assert list(inputs.restarts) == told and inputs.data == new.data
    before = TrainState("stage1", 7, cursor=AT, inputs=old.to_json())
    after = TrainState("stage1", 8, cursor={**AT, "position": 3}, inputs=Inputs.from_json(inputs.to_json()).to_json())
    assert cursor_of(before, inputs) == FeedCursor(Cursor(0, 0))
    assert cursor_of(after, inputs) == FeedCursor(Cursor(0, 3), 1)
    again, told = compare_inputs(Inputs.from_json(after.inputs), new, after.cursor, where="there", restart_data=True)
    assert (again.restarts, told) == (inputs.restarts, [])
    with pytest.raises(DataError, match="has 8 rows, and reading was to go on at row 29"):
        training_source(config).dataset(Cursor(0, 29))


def test_a_checkpoint_that_names_no_data_is_read_and_that_is_told(tmp_path: Path) -> None:
    dataset(tmp_path / "data", 40)
    config = run(tmp_path)
    checkpoint(config, inputs={})
    assert "is of an older version and names no data" in resumed(config)
    dataset(tmp_path / "data", 8)
    with pytest.raises(DataError, match=r"goes on at row 29 of an epoch, and there are 8 rows .*--restart-data"):
        run_training(config, resume=True, console=Console(file=io.StringIO()))
    assert "the data begin anew" in resumed(config, restart_data=True)
    elsewhere = run(tmp_path, data={"train": str(dataset(tmp_path / "other", 40)), "eval": str(tmp_path / "data")})
    with pytest.raises(ConfigError, match=r"data\.train: .*data.* in the checkpoint, .*other.* now"):
        run_training(elsewhere, resume=True, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "inputs", [{"data": 3}, {"data": {"rows": 1}}, {"models": {"vlm": 3}}, {"restarts": [1]}, {"models": 7}]
)
def test_a_record_that_cannot_be_is_refused(tmp_path: Path, inputs: dict[str, object]) -> None:
    dataset(tmp_path / "data", 40)
    config = run(tmp_path)
    checkpoint(config, inputs=inputs)
    with pytest.raises(CheckpointError, match="record of its inputs"):
        run_training(config, resume=True, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("section", "key"), [({"video": {"num_frames": 5}}, "video.num_frames"), ({"seed": 9}, "seed")]
)
def test_other_shapes_and_seeds_are_refused_by_key(tmp_path: Path, section: dict[str, object], key: str) -> None:
    dataset(tmp_path / "data", 40)
    checkpoint(run(tmp_path))
    for options in ({}, {"restart_data": True}):
        with pytest.raises(ConfigError, match=rf"{key}: .* in the checkpoint, .* now"):
            run_training(run(tmp_path, **section), resume=True, console=Console(file=io.StringIO()), **options)


def model(folder: Path, value: float, size: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full(size, value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_other_files_of_a_model_are_refused(tmp_path: Path) -> None:
    dataset(tmp_path / "data", 40)
    config = run(tmp_path, models={"vlm": str(model(tmp_path / "vlm", 1.0))})
    checkpoint(config)
    (tmp_path / "vlm" / "._model.safetensors").write_bytes(b"of a Mac")
    (tmp_path / "vlm" / "README.md").write_text("words")
    assert resumed(config) == ""
    model(tmp_path / "vlm", 2.0)
    with pytest.raises(
        CheckpointError, match=r"other files of its models:\n  models\.vlm: [0-9a-f]{16} in the checkpoint"
    ):
        run_training(config, resume=True, restart_data=True, console=Console(file=io.StringIO()))


def test_a_large_file_is_told_apart_by_pieces_of_it(tmp_path: Path) -> None:
    floats = WHOLE_BYTES // 4 + 5 * SAMPLE_BYTES
    before = model_digest(model(tmp_path / "m", 1.0, floats))
    assert model_digest(tmp_path / "m") == before
    path = tmp_path / "m" / "model.safetensors"
    with path.open("r+b") as file:  # the last weight
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert model_digest(tmp_path / "m") != before


@pytest.mark.parametrize("what", ["data", "model", "adapter", "lr", "placement"])
def test_a_supervised_run_continues_only_what_it_was_begun_with(tmp_path: Path, what: str) -> None:
    dataset(tmp_path / "data", 40)
    folder, adapter = model(tmp_path / "vlm", 1.0), model(tmp_path / "adapter", 1.0)

    def job(lr: float = 1e-3, **where: object) -> SftJob:
        tuning = SftModelSection(steps=500, optim=SftOptimSection(lr=lr), lora=SftLoraSection(rank=8))
        settings = SftSettings(tuning, LearnerSection(ranks=1, **where), adapter=str(adapter))  # type: ignore[arg-type]
        return prepare("vlm", folder, tmp_path / "data", tmp_path / "out", settings)

    before, name = job(), run_name(job())
    (before.out / "checkpoints" / name).mkdir(parents=True)
    assert run_name(before) == name and other_runs(before) == []
    if what in ("lr", "placement"):
        after = job(lr=0.5) if what == "lr" else job(placement="SPREAD", step_timeout_s=9.0)
    else:
        dataset(tmp_path / "data", 41) if what == "data" else model(folder if what == "model" else adapter, 2.0)
        after = job()
    assert (run_name(after) == name) == (what == "placement")
    assert [path.name for path in other_runs(after)] == ([] if what == "placement" else [name])
