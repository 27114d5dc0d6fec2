"""Data and checkpoints in an S3 bucket, at a server of its own on loopback: written, restored, and what is told when it fails.

The run, its step hook, tracker, checkpoint store and mirror are the real ones; learner and pools are the counters of
``test_recovery``. With real models: ``test_mirror_train_ray.py``.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.errors import CheckpointWriteError, StorageError
from pipeline.checkpoint import CheckpointStore, Mirror, uploads, uploads_to
from pipeline.cli import app
from pipeline.config import RunConfig, load_config
from pipeline.data import decoder
from pipeline.data.decoder import Shard, VideoShape, decode_block
from pipeline.data.schema import shard_digest, shard_metadata, shard_paths
from pipeline.data.sources import training_source
from pipeline.data.toy.shards import write_toy
from pipeline.data.video import VideoLimits
from pipeline.run.start import mirror_of, starting_point
from pipeline.run.train import Run, run_training
from pipeline.stages.feed import FeedCursor, SampleFeed
from pipeline.support.location import Uri, listing, open_store, opened, parse_location, read_bytes, remove
from pipeline.tracking import Tracker
from tests.pipeline.run.test_recovery import STEPS, ServedStage, ServingPool, World
from tests.pipeline.stages.test_feed import Numbers
from tests.pipeline.stages.test_loop import Fleet
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

NETWORK = "NETWORK_CONNECTION"


def test_a_dataset_in_a_bucket_is_the_one_of_a_folder(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket("toy-data")
    out = str(bucket / "a b")
    made = CliRunner().invoke(app, ["data", "toy", "--out", out, "--train", "4", "--test", "2"])
    assert made.exit_code == 0, made.output
    write_toy(tmp_path, train=4, test=2)
    for split in ("train", "test"):
        (here,), (there,) = shard_paths(tmp_path / split), shard_paths(parse_location(out) / split)
        assert read_bytes(there) == Path(here).read_bytes()
        assert shard_digest(there, shard_metadata(there)) == shard_digest(here, shard_metadata(here))
    again = CliRunner().invoke(app, ["data", "toy", "--out", out, "--train", "4", "--test", "2"])
    assert "already holds a dataset" in again.output
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)  # as AWS's own tools have it
    open_store.cache_clear()
    assert len(shard_paths(Uri("s3://toy-data/a%20b/train"))) == 1
    open_store.cache_clear()
    shown = CliRunner().invoke(
        app, ["data", "inspect", f"{bucket / 'a b' / 'test'}", "--sheet", str(tmp_path / "s.png")]
    )
    assert shown.exit_code == 0 and (tmp_path / "s.png").is_file()


def test_a_bucket_that_is_not_there_is_named_with_its_key(s3: S3Server, tmp_path: Path) -> None:
    config = load_config("toy", [f"data.train={s3.uri('no-such-bucket/train')}", f"out={tmp_path}/run"])
    with pytest.raises(
        StorageError, match=r"^data\.train: s3://no-such-bucket/train\?.*: there is no bucket 'no-such-bucket'"
    ):
        training_source(config)
    refused = CliRunner().invoke(app, ["data", "toy", "--out", s3.uri("no-such-bucket/toy")])
    assert refused.exit_code == 2 or "no bucket" in str(refused.exception)
    config = load_config("toy", [f"checkpoint.mirror={s3.uri('no-such-bucket/run')}", f"out={tmp_path}/run"])
    with pytest.raises(StorageError, match=r"^checkpoint\.mirror: s3://.*there is no bucket 'no-such-bucket'; make it"):
        run_training(config)
    assert not (tmp_path / "run").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


def settings(out: Path, mirror: str, *more: str) -> RunConfig:
    values = [
        f"out={out}",
        f"checkpoint.mirror={mirror}",
        f"tracking.experiment={out.parent.name}",
        "tracking.clips_every=0",
    ]
    return load_config("toy", [*values, "checkpoint.every=1", *more])


def go(config: RunConfig, world: World, kind: type[ServedStage] = ServedStage, *, resume: bool = False) -> str:
    """Train one stage as ``run_training`` does; returns the console's text."""
    paper = Console(file=io.StringIO(), width=500)
    mirror = mirror_of(config)
    checkpoint = starting_point(config, resume, False, mirror)
    state = checkpoint.state if checkpoint else None
    feed = SampleFeed(Numbers(), 2, *([FeedCursor.from_json(state.cursor)] if state else []))  # type: ignore[arg-type]
    ids = state.mlflow_run_ids if state else {}
    section = config.checkpoint
    with (
        Tracker.start(config, resume_run_id=ids.get("parent"), strict=False) as tracker,
        uploads_to(mirror, section.max_failures, section.mirror_timeout_s, paper) as sent,
    ):
        ids = ids | {"parent": tracker.run_id}
        run = Run(
            config, tracker, paper, feed, checkpoint, run_ids=ids, uploads=sent, open_learners=world.learners_open
        )
        world.sent = sent  # type: ignore[attr-defined]
        if state is not None:
            run.offer_earlier(state)
        fleet = Fleet(vlm=ServingPool("vlm", world=world))
        stage: Any = lambda config, fleet: kind(0, steps=STEPS, fleet=fleet, world=world)  # noqa: E731
        run.stop.run(run.stage(stage, fleet, state))  # type: ignore[arg-type]
    return paper.file.getvalue()  # type: ignore[attr-defined]


def curve(config: RunConfig, name: str = "learner/loss") -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    (child,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'stage1'")
    return sorted((m.step, m.value) for m in client.get_metric_history(child.info.run_id, name))


def stored(mirror: Mirror) -> list[int]:
    return [int(found.name[-1]) for found in mirror.checkpoints()]


def test_a_run_whose_folder_is_gone_goes_on_from_the_bucket(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.bucket("runs")
    config, world = settings(tmp_path / "run", str(bucket / "x")), World()
    go(config, world)
    whole, losses = world.learners[-1].seen, curve(config)
    mirror = mirror_of(config)
    assert mirror is not None and stored(mirror)[0] == STEPS and len(stored(mirror)) <= 3
    assert {info.base_name for info in listing(bucket / "x")} >= {"checkpoints", "vlm_adapter"}
    # The newest becomes a half-uploaded one, so that there is something left to train.
    remove(bucket / "x" / "checkpoints" / f"stage1-step00000{STEPS}" / "manifest.json")
    assert stored(mirror) and stored(mirror)[0] < STEPS
    shutil.rmtree(config.out)
    again = World()
    go(config, again, resume=True)
    assert again.learners[-1].seen == whole and curve(config) == losses
    assert again.calls["update"] < world.calls["update"] == STEPS
    assert stored(mirror)[0] == STEPS
    latest = CheckpointStore(config.out / "checkpoints").latest()
    assert latest is not None and latest.step == STEPS


def test_a_server_that_goes_away_costs_warnings_and_not_the_run(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost rows of a dataset: they cannot be read, and are not taken for damaged ones."""
    monkeypatch.setattr(uploads, "PAUSES_S", ())
    monkeypatch.setattr(decoder, "STORE_PAUSES_S", ())
    bucket = s3.bucket("away")
    write_toy(bucket / "toy", train=1, test=0)
    shards = tuple(map(Shard.of, shard_paths(bucket / "toy" / "train")))
    block = {name: np.zeros(1, np.int64) for name in ("epoch", "position", "shard", "group", "offset", "row")}
    assert list(decode_block(dict(block), shards, VideoShape(), VideoLimits())["error"]) == [""]
    decoder._read_group.cache_clear()

    class Outage(ServedStage):
        async def group(self, sample: Any, step: int) -> Any:
            world = self.world
            if step == 2 and not world.calls["outage"]:
                world.calls["outage"] += 1
                s3.stop()
            if step == 4 and world.calls["outage"] == 1:
                world.calls["outage"] += 1
                with pytest.raises(StorageError, match=NETWORK):
                    decode_block(dict(block), shards, VideoShape(), VideoLimits())
                deadline = time.monotonic() + 120
                while not world.sent.total:  # type: ignore[attr-defined]
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                s3.start()
                s3.bucket("away")
            return await super().group(sample, step)

    config, world = settings(tmp_path / "run", str(bucket / "x")), World()
    text = go(config, world, Outage)
    assert NETWORK in text and "could not be sent to the mirror" in text and "The run goes on" in text
    assert curve(config, "checkpoint/mirror_failed")[0][1] >= 1.0
    assert len(world.learners[-1].seen) == 4 * STEPS
    mirror = mirror_of(config)
    assert mirror is not None and stored(mirror)[0] == STEPS


def test_a_bucket_that_is_deleted_ends_the_run_with_everything_kept_here(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PAUSES_S", ())
    bucket = s3.bucket("deleted")

    class Deleted(ServedStage):
        async def group(self, sample: Any, step: int) -> Any:
            if step == 2 and not self.world.calls["deleted"]:
                self.world.calls["deleted"] += 1
                store, path = opened(Uri(bucket.base, f"{bucket.query}&allow_bucket_deletion=true"))
                time.sleep(0.5)  # what is under way
                store.delete_dir(path)
            return await super().group(sample, step)

    config, world = settings(tmp_path / "run", str(bucket / "x"), "checkpoint.max_failures=1"), World()
    with pytest.raises(CheckpointWriteError, match=r"there is no bucket 'deleted'"):
        go(config, world, Deleted)
    s3.bucket("deleted")
    done = World()
    go(config, done, resume=True)
    mirror = mirror_of(config)
    assert mirror is not None and stored(mirror)[0] == STEPS and len(done.learners[-1].seen) == 4 * STEPS
