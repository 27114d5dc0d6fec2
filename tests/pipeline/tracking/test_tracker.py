"""What a run logs is in MLflow afterwards, whatever happens to the store or to the run meanwhile."""

import asyncio
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.config import RunConfig, flatten, parse_config
from pipeline.config.machinery import TrackingSection
from pipeline.data.source import Cursor
from pipeline.data.video import decode_video
from pipeline.run.after_step import StepHook
from pipeline.run.recovery import Restarts
from pipeline.stages.alarms import AlarmWatch
from pipeline.stages.feed import FeedCursor
from pipeline.tracking import Tracker, TrackingError
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import database_file, has_store, location

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sqlite store for all tests of the module: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store") / "mlflow.db"


@pytest.fixture
def config(database: Path, tmp_path: Path) -> RunConfig:
    return parse_config({"name": "test", "out": str(tmp_path), "tracking": {"uri": f"sqlite:///{database}"}})


def client_of(tracker: Tracker) -> MlflowClient:
    return MlflowClient(tracking_uri=tracker.uri)


def history(tracker: Tracker, run: str, metric: str) -> list[tuple[int, float]]:
    points = client_of(tracker).get_metric_history(tracker.run_ids[run], metric)
    return sorted((point.step, point.value) for point in points)


def clip(level: int = 0) -> np.ndarray:
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    frames[:, 8:24, 8:24] = [200, level, 40]
    return frames


def test_a_job_can_be_read_back(config: RunConfig, tmp_path: Path, toy_shards: Path) -> None:
    with Tracker.start(config) as tracker:
        tracker.log_dataset(toy_shards / "train")
        with tracker.stage("stage1") as run_id:
            for step in range(3):
                tracker.log_metrics({"reward/total_mean": step / 2, "pool/vlm/ready": 2}, step)
            tracker.log_clip(clip(), "the red box rises", step=2)
            tracker.log_clip(clip(90), "the red box sinks", step=2)
            tracker.log_image(clip()[0], step=2, key="sheet")
            tracker.log_checkpoint(tmp_path / "checkpoints" / "stage1-step000003")
        tracker.log_table({"system": ["sft", "joint"], "clip_v": [0.5, 0.6]})
        tracker.log_metrics({"eval/sft/clip_v": 0.5}, step=0)
    assert (tracker.counts.spooled, tracker.counts.rejected) == (0, 0)

    client = client_of(tracker)
    parent, stage = client.get_run(tracker.run_id), client.get_run(run_id)
    assert (parent.info.status, stage.info.status) == ("FINISHED", "FINISHED")
    assert stage.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert history(tracker, "stage1", "reward/total_mean") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert parent.data.metrics == {"eval/sft/clip_v": 0.5}
    assert parent.data.params == {key: str(value) for key, value in flatten(config).items()}
    assert stage.data.tags["checkpoint.latest"].startswith("file://")
    assert stage.data.tags["checkpoint.latest"].endswith("checkpoints/stage1-step000003")
    assert parent.data.tags["version.torch"].startswith("2.")
    (dataset,) = parent.inputs.dataset_inputs
    assert dataset.dataset.profile == '{"num_rows": 24}'
    assert len(dataset.dataset.digest) == 36

    assert {file.path for file in client.list_artifacts(tracker.run_id)} >= {"config.yaml", "evaluation.json"}
    folder = tmp_path / "downloaded"
    folder.mkdir()
    samples = Path(client.download_artifacts(run_id, "samples/step000002", str(folder)))
    assert {path.name for path in samples.iterdir()} == {f"sample{n}.{e}" for n in ("", "_2") for e in ("mp4", "txt")}
    assert (samples / "sample.txt").read_text() == "the red box rises\n"
    shown = decode_video(samples / "sample.mp4", 5, 32, 32)
    assert np.abs(shown.astype(int) - clip()).mean() < 8
    assert len(client.list_artifacts(run_id, "images")) >= 3  # two film strips and the sheet
    assert not any(path.is_file() for path in (tmp_path / "tracking").rglob("*"))  # nothing left behind


def test_git_state_is_noted(config: RunConfig) -> None:
    from pipeline.tracking.lineage import git_tags

    tags = git_tags()
    if not tags:
        pytest.skip("not a git work tree")
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["vans.git.dirty"] in ("true", "false")


def test_resumed_job_goes_on_in_the_same_runs_without_repeating_steps(config: RunConfig) -> None:
    with pytest.raises(ZeroDivisionError), Tracker.start(config) as first, first.stage("stage1") as stage_id:
        for step in range(4):
            first.log_metrics({"learner/loss": float(step)}, step)
        1 / 0  # noqa: B018
    status = client_of(first).get_run(stage_id)
    assert status.info.status == "FAILED"
    assert status.data.tags["vans.error"].startswith("ZeroDivisionError")

    changed = config.model_copy(update={"seed": 7})
    with Tracker.start(changed, resume_run_id=first.run_id) as second:
        with second.stage("stage1", resume_run_id=stage_id) as same:
            assert same == stage_id
            for step in range(2, 6):  # steps 2 and 3 are replayed from the checkpoint
                second.log_metrics({"learner/loss": float(step)}, step)
        with second.stage("stage2"):
            second.log_metrics({"learner/loss": 9.0}, 0)
    assert history(second, "stage1", "learner/loss") == [(step, float(step)) for step in range(6)]
    parent = client_of(second).get_run(first.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["seed"] == "0"
    assert parent.data.tags["changed.seed"] == "7"
    assert client_of(second).get_run(stage_id).info.status == "FINISHED"


def test_resume_finds_the_stage_by_name_after_a_kill(config: RunConfig) -> None:
    first = Tracker.start(config)
    with first.stage("stage1") as stage_id:
        first.log_metrics({"learner/loss": 1.0}, 0)
    first.flush()  # and then the process is gone: nothing is closed
    with Tracker.start(config, resume_run_id=first.run_id) as second, second.stage("stage1") as again:
        second.log_metrics({"learner/loss": 2.0}, 1)
    assert again == stage_id
    assert history(second, "stage1", "learner/loss") == [(0, 1.0), (1, 2.0)]
    first.close()


def test_interrupted_job_is_killed_not_failed(config: RunConfig) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker.start(config) as tracker:
        raise KeyboardInterrupt
    assert client_of(tracker).get_run(tracker.run_id).info.status == "KILLED"


def test_metrics_survive_a_locked_store_and_steps_do_not_wait(config: RunConfig, database: Path) -> None:
    with Tracker.start(config) as tracker:
        tracker.flush()
        lock = sqlite3.connect(database, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        started = time.perf_counter()
        try:
            for step in range(300):
                tracker.log_metrics({"learner/loss": float(step), "learner/lr": 1e-3}, step)
            # One step that waited for the store would take as long as SQLite waits for a lock.
            assert time.perf_counter() - started < 10.0
        finally:
            lock.execute("ROLLBACK")
            lock.close()
    assert tracker.counts.spooled == 0
    assert history(tracker, "parent", "learner/loss") == [(step, float(step)) for step in range(300)]


def test_undeclared_metric_is_an_error_in_strict_mode_and_a_warning_otherwise(config: RunConfig, caplog) -> None:
    with Tracker.start(config, strict=True) as tracker, pytest.raises(TrackingError, match="reward/made_up"):
        tracker.log_metrics({"reward/made_up": 1.0}, 0)
    with caplog.at_level(logging.WARNING), Tracker.start(config, strict=False) as tracker:
        for step in range(2):
            tracker.log_metrics({"reward/made_up": 1.0}, step)
    assert caplog.text.count("reward/made_up") == 1
    assert history(tracker, "parent", "reward/made_up") == [(0, 1.0), (1, 1.0)]


def test_wrong_address_is_an_error_at_the_start(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 does not answer"):
        Tracker.start(config)
    assert time.perf_counter() - started < 20


def test_resume_without_a_server_is_an_error_too(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 does not answer"):
        Tracker.start(config, resume_run_id="0123456789abcdef0123456789abcdef")


def test_steps_that_are_replayed_within_a_process_stay_as_they_were(config: RunConfig) -> None:
    with Tracker.start(config) as tracker, tracker.stage("stage1"):
        for step in range(4):
            tracker.log_metrics({"learner/loss": float(step)}, step)
        tracker.replay()
        for step in range(2, 6):
            tracker.log_metrics({"learner/loss": 10.0 + step}, step)
    assert history(tracker, "stage1", "learner/loss") == [(s, float(s) if s < 4 else 10.0 + s) for s in range(6)]


def test_run_to_resume_must_be_in_the_store(config: RunConfig) -> None:
    with pytest.raises(TrackingError, match="cannot resume the MLflow run 0123"):
        Tracker.start(config, resume_run_id="0123456789abcdef0123456789abcdef")


def test_environment_wins_over_configuration_and_both_over_the_default(config: RunConfig, monkeypatch) -> None:
    assert location(config.out, config.tracking)[0] == config.tracking.uri
    plain = parse_config({"out": str(config.out)})
    assert location(plain.out, plain.tracking) == (f"sqlite:///{config.out}/mlflow.db", config.out / "mlartifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert location(config.out, config.tracking) == ("http://127.0.0.1:5000", None)


def test_a_checkpoint_comes_after_the_figures_of_its_steps(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed just after a checkpoint does not repeat its steps: they must not be on their way still."""
    deliver = MlflowStore.deliver

    def slow(store: MlflowStore, record: dict[str, Any]) -> None:
        time.sleep(0.5 if record["op"] == "metrics" else 0.0)
        deliver(store, record)

    monkeypatch.setattr(MlflowStore, "deliver", slow)
    found: list[list[tuple[int, float]]] = []
    with Tracker.start(config) as tracker:

        class Keeper:
            async def save(self, *_: object, **__: object) -> None:
                found.append(history(tracker, "stage1", "reward/total_mean"))

        keeper = Keeper()
        keeper.tracker = tracker  # type: ignore[attr-defined]
        alarms = AlarmWatch(config.alarms, ())
        hook = StepHook(config, keeper, None, {}, alarms, None, Restarts("stage1", 0, ""))  # type: ignore[arg-type]
        with tracker.stage("stage1"):
            tracker.log_metrics({"reward/total_mean": 0.5}, 1)
            asyncio.run(hook.save(2, FeedCursor(Cursor(0, 0)), last=False))
    assert found == [[(1, 0.5)]]


def test_a_folder_s_name_may_have_characters_that_mean_something_in_a_uri(tmp_path: Path) -> None:
    out = tmp_path / "100%41 ?a=b #c ü'\""
    with Tracker.open("run", out, TrackingSection(), {"a": 1}) as tracker:
        assert database_file(tracker.uri) == out / "mlflow.db"
    assert has_store(out, TrackingSection())
    client = MlflowClient(tracker.uri)
    assert client.get_run(tracker.run_id).data.params == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == [out.name]


@pytest.mark.parametrize("damage", ["file", "folder"])
def test_a_store_that_cannot_be_opened_is_told_at_once(tmp_path: Path, damage: str) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database" * 100) if damage == "file" else database.mkdir()
    with pytest.raises(TrackingError, match=r"mlflow\.db cannot be used: .*tracking\.uri"):
        Tracker.open("run", tmp_path, TrackingSection(), {})
