"""TensorBoard and W&B get what MLflow has, each step once, and never hold it up."""

import json
import logging
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config import RunConfig, parse_config
from pipeline.config.machinery import SinkName, TrackingSection
from pipeline.tracking import Tracker, TrackingError
from pipeline.tracking.also import PARENT, SINKS, Copies, Job, WeightsAndBiases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "mlflow.db"


def config_of(database: Path, out: Path, *also: SinkName) -> RunConfig:
    tracking = {"uri": f"sqlite:///{database}", "also": list(also)}
    return parse_config({"name": "test", "out": str(out), "tracking": tracking})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of a TensorBoard folder: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {name: sorted(points) for name, points in found.items()}


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """Read what was logged from W&B's offline file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, record, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # too little for another header: padding
            at += left
            continue
        size, part = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # whole, or the last part
            message = wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
            record = b""
            items = message.history.item
            if items:
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def images(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\x89PNG") for path in folder.glob("events.*"))


def test_tensorboard_has_every_step_once_where_a_resumed_run_repeats_some(database: Path, tmp_path: Path) -> None:
    config = config_of(database, tmp_path, "tensorboard")
    with pytest.raises(ZeroDivisionError), Tracker.start(config) as first, first.stage("stage1") as stage:
        for step in range(4):
            first.log_metrics({"reward/total_mean": step / 2}, step)
        first.log_image(np.zeros((8, 8, 3), np.uint8), step=2, key="sheet")
        1 / 0  # noqa: B018
    with Tracker.start(config, resume_run_id=first.run_id) as second, second.stage("stage1", resume_run_id=stage):
        for step in range(2, 6):
            second.log_metrics({"reward/total_mean": step / 2}, step)
    folder = tmp_path / "tracking" / "tensorboard"
    assert scalars(folder / "stage1") == {"reward/total_mean": [(step, step / 2) for step in range(6)]}
    assert images(folder / "stage1") == 1
    assert b"stage1.steps" in b"".join(path.read_bytes() for path in (folder / PARENT).glob("events.*"))


def test_wandb_gets_both_stages_in_one_run_offline(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Tracker.start(config_of(database, tmp_path, "wandb")) as tracker:
        for name in ("stage1", "stage2"):
            with tracker.stage(name):
                tracker.log_metrics({"reward/total_mean": 0.25}, 0)
                tracker.log_metrics({"reward/total_mean": 0.5}, 1)
                tracker.log_image(np.zeros((8, 8, 3), np.uint8), step=1, key="sheet")
    (run,) = (tmp_path / "tracking" / "wandb").glob("offline-run-*")
    assert run.name.endswith(tracker.run_id)
    logged: list[dict[str, Any]] = []
    until = time.monotonic() + 30  # W&B's own process writes the file, and may still do so when the run has finished
    while len(logged) < 6 and time.monotonic() < until:
        time.sleep(0.1)
        logged = wandb_history(next(run.glob("*.wandb")))
    for name in ("stage1", "stage2"):
        points = [
            (row[f"{name}/step"], row[f"{name}/reward/total_mean"])
            for row in logged
            if f"{name}/reward/total_mean" in row
        ]
        assert points == [(0, 0.25), (1, 0.5)]
    assert len(list((run / "files" / "media").rglob("*.png"))) == 2


class Broken:
    """A sink whose disk is full."""

    def params(self, values: Mapping[str, str]) -> None:
        raise OSError("no space left")

    def metrics(self, run: str, step: int, values: Mapping[str, float]) -> None:
        raise OSError("no space left")

    def image(self, run: str, key: str, path: Path, step: int) -> None:
        raise OSError("no space left")

    def close(self, failed: bool) -> None:
        raise OSError("no space left")


def test_a_sink_that_fails_is_told_once_and_mlflow_has_everything(
    database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), Tracker.start(config_of(database, tmp_path)) as tracker:
        tracker.store.copies = Copies({"broken": Broken()})
        for step in range(3):
            tracker.log_metrics({"reward/total_mean": float(step)}, step)
            tracker.flush()
    assert (tracker.counts.spooled, tracker.counts.rejected) == (0, 0)
    assert [line for line in caplog.messages if "broken (tracking.also)" in line] == [
        "broken (tracking.also) did not take a record, which MLflow has: OSError: no space left"
    ]
    assert tracker.store.copies.failed >= 4
    assert len(tracker.store.client.get_metric_history(tracker.run_id, "reward/total_mean")) == 3


def test_a_sink_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(job: Job) -> WeightsAndBiases:
        raise ModuleNotFoundError("No module named 'wandb'", name="wandb")

    monkeypatch.setitem(SINKS, "wandb", missing)  # type: ignore[arg-type]
    with pytest.raises(TrackingError, match="pip install wandb"):
        Copies.open(("wandb",), Job("test", "vans", "1", tmp_path))


def test_every_name_that_a_run_may_give_has_a_sink() -> None:
    with pytest.raises(ValidationError, match="tensorboard"):
        TrackingSection.model_validate({"also": ["tensorbord"]})
    assert TrackingSection(also=list(SINKS)).also == ["tensorboard", "wandb"]
