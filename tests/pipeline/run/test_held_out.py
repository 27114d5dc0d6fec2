"""Which checkpoint is the best, when a stage ends for want of one, which samples are asked, and what is refused. Pure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, ConfigError
from pipeline.checkpoint import CheckpointStore, Uploads
from pipeline.config import RunConfig, load_config
from pipeline.config.resume import is_free
from pipeline.data.schema import ShardWriter
from pipeline.data.sources import validation_source
from pipeline.data.toy.shards import toy_row
from pipeline.data.toy.world import make_sample
from pipeline.evaluate.table import METRICS, require_metric
from pipeline.run.best import Mark, Standing, export_best, exported
from pipeline.run.held_out import HeldOut
from pipeline.run.start import require_trainable
from pipeline.tracking.profile import summarise


def standing(values: list[float | None], higher: bool = True, start: Standing | None = None) -> Standing:
    found = start or Standing("m")
    for step, value in enumerate(values):
        found = found.after("stage1", step, value, higher)
    return found


def settings(*more: str) -> RunConfig:
    return load_config("toy", ["evaluate.every=2", "data.val=data/toy/val", *more])


@pytest.mark.parametrize(
    ("values", "higher", "step", "since"),
    [
        ([1.0, 2.0, 1.5], True, 1, 1),
        ([1.0, 2.0, 1.5], False, 0, 2),
        ([1.0, 1.0, 1.0], True, 0, 2),  # of equal ones the earlier
        ([None, 1.0, float("nan")], True, 1, 1),  # what cannot be computed is no best
        ([1.0, 0.5, 2.0], True, 2, 0),
    ],
)
def test_the_best_is_the_best_value_so_far(values: list[float | None], higher: bool, step: int, since: int) -> None:
    found = standing(values, higher)
    assert found.best is not None and (found.best.step, found.since, found.asked) == (step, since, 2)


def test_a_stage_ends_after_so_many_evaluations_without_a_new_best() -> None:
    assert not standing([1.0, 0.9, 0.8]).enough(3)
    assert standing([1.0, 0.9, 0.8, 0.7]).enough(3)
    assert not standing([1.0, 0.9, 0.8, 0.7]).enough(0)


def test_the_next_stage_has_a_best_of_its_own_and_the_run_keeps_the_better() -> None:
    first = standing([1.0, 3.0])
    second = first.next_stage()
    assert (second.since, second.asked, second.stage_best) == (0, -1, None)
    second = second.after("stage2", 0, 2.0, True).after("stage2", 1, 2.5, True)
    assert second.best == Mark("stage1", 1, 3.0) and second.stage_best == Mark("stage2", 1, 2.5) and second.since == 0
    assert second.after("stage2", 2, 3.5, True).best == Mark("stage2", 2, 3.5)


@pytest.mark.parametrize("found", [Standing(), standing([1.0, 0.5]), standing([None])])
def test_a_checkpoint_holds_the_standing_exactly(found: Standing) -> None:
    assert Standing.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    "change",
    [{"since": "1"}, {"measured": 3}, {"best": {"stage": "stage1"}}, {"best": {"stage": 1, "step": 1, "value": 0.5}}],
)
def test_a_damaged_standing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="record of held-out evaluations"):
        Standing.from_json(standing([1.0]).to_json() | change)


def test_the_best_export_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    export_best(tmp_path, {"vlm_adapter": tmp_path / "a", "vdm_adapter": tmp_path / "a"}, {"step": 1})
    export_best(tmp_path, {"vlm_adapter": tmp_path / "b"}, {"step": 2})
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"vlm_adapter", "best.json"}
    assert (tmp_path / "best" / "vlm_adapter" / "file").read_text() == "b" and exported(tmp_path) == {"step": 2}
    (tmp_path / "best" / "best.json").write_text("[" * 100_000)
    assert exported(tmp_path) == {}
    assert [path.name for path in tmp_path.glob(".best*")] == []


def test_the_best_checkpoint_stays_beside_the_newest_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.best = tmp_path / "stage1-step000001"
    for step in range(5):
        with store.write("stage1", step) as folder:
            (folder / "file").write_text("x")
    assert [path.name[-1] for path in store.paths("stage1")] == ["4", "3", "1"]
    store.best = tmp_path / "stage1-step000004"
    assert [path.name[-1] for path in store.prune()] == ["1"]


def held(config: RunConfig, tmp_path: Path) -> HeldOut:
    return HeldOut(config, None, CheckpointStore(tmp_path / "checkpoints"), Uploads(), validation_source(config))  # type: ignore[arg-type]


def test_evaluations_are_due_once_each_from_step_zero(toy_shards: Path, tmp_path: Path) -> None:
    found = held(settings(f"data.val={toy_shards}/val", f"out={tmp_path}"), tmp_path)
    found.take_up(Standing())
    assert [step for step in range(5) if found.due(step)] == [0, 2, 4]
    found.standing = found.standing.after("stage1", 2, 1.0, True)
    assert not found.due(2)  # a resumed run does not repeat it
    assert found.is_best("stage1", 2) and not found.is_best("stage2", 2)
    found.settle(saved=False)
    assert found.standing.best is None and found.standing.stage_best == Mark("stage1", 2, 1.0)


def test_a_best_that_was_measured_otherwise_is_not_compared(toy_shards: Path, tmp_path: Path) -> None:
    values = [f"data.val={toy_shards}/val", f"out={tmp_path}"]
    before = held(settings(*values), tmp_path)
    before.take_up(Standing())
    mark = before.standing.after("stage1", 2, 1.0, True)
    for same in ("evaluate.every=1", "evaluate.stop_if_not_better=3", "evaluate.samples=7"):
        again = held(settings(*values, same), tmp_path)
        assert again.take_up(mark) is None and again.standing == mark
        assert again.store.best == tmp_path / "checkpoints" / "stage1-step000002"
    for other in ("evaluate.metric=rouge_l", "evaluate.subset=3", "evaluate.seed=1", "evaluate.render.steps=3"):
        again = held(settings(*values, other), tmp_path)
        assert "anew" in (again.take_up(mark) or "") and again.standing.best is None


def test_the_subset_depends_on_seed_and_ids_and_not_on_the_shards(toy_shards: Path, tmp_path: Path) -> None:
    def chosen(folder: Path, *more: str, subset: int = 4) -> list[str]:
        ids = validation_source(settings(f"data.val={folder}", f"evaluate.subset={subset}", *more)).ids()
        assert len(set(ids)) == min(subset, 8)
        return ids

    with ShardWriter(tmp_path / "otherwise", rows_per_shard=3) as writer:
        for index in reversed(range(8)):
            writer.write(toy_row(make_sample(index, "val", 0)))
    val = toy_shards / "val"
    assert chosen(val) == chosen(tmp_path / "otherwise") != chosen(val, "seed=1")
    assert chosen(val, subset=3) == chosen(val)[:3] and len(chosen(val, subset=99)) == 8


def test_what_cannot_be_is_refused_with_what_would_be_right() -> None:
    with pytest.raises(ConfigError, match=r"data\.val, which is not set.*such as data/toy/val"):
        load_config("toy", ["evaluate.every=1"])
    for key in ("train", "eval"):
        with pytest.raises(ConfigError, match=rf"is data\.{key} too"):
            settings(f"data.{key}=data/toy/val")
    with pytest.raises(ConfigError, match=r"stage1\.optim\.ema=0\.5 and stage1\.rollout\.max_staleness=1"):
        settings("stage1.optim.ema=0.5", "stage1.rollout.max_staleness=1")
    with pytest.raises(ConfigError, match=r"metric='clip' is not known.*rouge_l ↑.*frechet ↓"):
        require_trainable(settings("evaluate.metric=clip"))
    for key in ("every", "subset", "metric", "stop_if_not_better"):
        with pytest.raises(ConfigError, match=key):
            load_config("toy", [f"evaluate.{key}=-1"])
        assert is_free(f"evaluate.{key}")
    assert is_free("data.val") and load_config("toy").evaluate.every == 0


def test_every_metric_says_whether_higher_is_better() -> None:
    assert all(heading[-1] in "↑↓" for heading in METRICS.values())
    assert require_metric("clip_v") and not require_metric("frechet")


def test_an_evaluation_is_a_part_of_its_step_s_profile() -> None:
    series = {"profile/step_s": [(0, 9.0), (1, 4.0), (2, 8.0)], "time/evaluate_s": [(0, 5.0), (1, 0.0), (2, 4.0)]}
    found = summarise("stage1", series)
    assert found is not None and found.parts["held-out evaluation"] == 2.0
