"""Rows that are asked other questions: what is asked, of which samples, and where their figures stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.config import load_config
from pipeline.data.schema import shard_paths
from pipeline.data.sources import evaluation_source
from pipeline.data.toy.language import drawable, parse_caption
from pipeline.evaluate.predictions import Prediction
from pipeline.reproduce import Experiment, load_experiment
from pipeline.reproduce.asking import as_asked, background_of, data_folder, in_words, make_samples, said, shown
from pipeline.reproduce.report import write_report
from pipeline.reproduce.reproducing import RowResult, _claim, _Seed
from pipeline.reproduce.spec import Asked, Ordering, Row
from tests.pipeline.reproduce.test_reproducing import finished


def row(**asked: object) -> Row:
    return Row(title="r", asked=Asked.model_validate(asked))


def test_a_row_that_is_asked_nothing_else_is_asked_as_ever() -> None:
    plain, config, answer = (
        Row(title="r"),
        load_config("toy"),
        Prediction("a", "b", frames=np.zeros((3, 2, 2, 3), "u1")),
    )
    assert background_of(plain) is None and as_asked(config, plain) is config and shown(plain, answer) is answer
    assert said(plain)("the azure box sinks") == "the azure box sinks"


def test_unseen_words_other_conditionings_and_held_clips_are_what_they_say() -> None:
    assert said(row(wording="unseen"))("the azure box sinks") == "the cobalt block drops"
    clip = {"references": "clip", "take": 2, "time": "shared"}
    asked = as_asked(load_config("toy"), row(conditioning=clip))
    assert asked.video.conditioning.model_dump() == clip and asked.models == load_config("toy").models
    frames = np.arange(9 * 12, dtype=np.uint8).reshape(9, 2, 2, 3)
    held = shown(row(held=True), Prediction("a", "b", frames=frames)).frames
    assert held is not None and held.shape == frames.shape and all(np.array_equal(f, frames[0]) for f in held)
    assert shown(row(held=True), Prediction("a", "")).frames is None
    assert in_words(row(background="moss", wording="unseen").asked) == "captions in unseen words, background moss"  # type: ignore[arg-type]


def test_a_row_on_another_background_is_asked_about_the_same_samples_in_it(tmp_path: Path) -> None:
    there = row(background="moss")
    experiment = Experiment(rows={"sft": Row(title="SFT"), "moss": there}, train_samples=4, test_samples=4)
    make_samples(experiment, tmp_path)
    assert data_folder(tmp_path, None) == tmp_path / "data"
    config = _Seed(experiment, tmp_path, 0, "val", Console()).config(there, tmp_path / "row", "val")
    source = evaluation_source(config)
    assert source.count == 4 and config.data.eval == tmp_path / "data-moss" / "val"


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ({"a": {"title": "a", "asked": {}}}, "asked says nothing else than the table's questions"),
        ({"a": {"title": "a", "asked": {"background": "night"}}}, r"asked\.background='night': write moss"),
        ({"a": {"title": "a", "asked": {"held": True}, "set": ["stage1.steps=1"]}}, "asked goes with neither set nor"),
        (
            {"a": {"title": "a", "asked": {"held": True}, "paper": {"clip_v": [0.1, None]}}},
            "the paper has no figures for other questions",
        ),
        ({"sft": {"title": "a", "asked": {"held": True}}}, "baseline='sft' is asked other questions"),
    ],
)
def test_contradictions_of_what_is_asked_are_refused(rows: dict, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Experiment(rows={"sft": Row(title="SFT")} | rows)


@pytest.mark.parametrize(
    ("ordering", "wrong"),
    [
        ({"metric": "clip_w", "rows": ["a", "sft"]}, "metric='clip_w' is not measured"),
        ({"metric": "video_similarity", "rows": ["a", "sft"]}, "metric='video_similarity' is not measured"),
        ({"metric": "clip_v", "best": "a"}, "'a' is asked other questions than the rows it is compared with"),
    ],
)
def test_a_claim_rests_on_what_is_measured_and_on_the_same_questions(ordering: dict, wrong: str) -> None:
    rows = {"sft": Row(title="SFT"), "a": row(held=True)}
    with pytest.raises(ValueError, match=wrong):
        Experiment(rows=rows, orderings=[Ordering(claim="c", **ordering)])


def test_the_bundled_encoders_experiment_is_sound_and_its_trained_rows_have_no_pool_for_what_is_only_measured(
    tmp_path: Path,
) -> None:
    from pipeline.fleet.open import pool_sections

    experiment = load_experiment("encoders")
    made = {key: RowResult(key, vlm="v", vdm="d") for key in experiment.rows}
    seed = _Seed(experiment, tmp_path, 0, "test", Console(), made)
    for key, each in experiment.rows.items():
        if each.set is None:
            assert each.asked is not None or key == "sft"
            continue
        config = seed.config(each, tmp_path / key, "train")
        weights = {**config.stage1.rewards.weights} if config.stage1.steps else {**config.stage2.rewards.weights}
        assert ("video_similarity" in pool_sections(config)) == ("video_similarity" in weights), key
    _claim(tmp_path, experiment)
    assert "video_similarity" in json.loads((tmp_path / "experiment.json").read_text())["models"]


def test_rows_asked_otherwise_stand_apart_in_the_report(tmp_path: Path) -> None:
    rows = {
        "sft": Row(title="SFT"),
        "good": Row(title="Good", set=[]),
        "moss": Row(title="Moss", vlm="good", asked=Asked(background="moss")),
    }
    claims = [
        {"claim": "best", "metric": "clip_v", "best": "good"},
        {"claim": "elsewhere", "metric": "clip_v", "rows": ["moss", "sft"]},
    ]
    experiment = Experiment(title="Ours", rows=rows, orderings=claims)
    finished(tmp_path, experiment, 2)
    text = write_report(experiment, tmp_path, seeds=[0, 1], keys=list(rows), split="test", command="c").read_text()
    head, _, tail = text.partition("## Asked other questions")
    assert "| Moss" not in head and "| Good" in head and "- Moss: background moss" in tail and "| Moss" in tail
    assert text.startswith("# Ours (test split)") and "paper" not in head
    verdicts = json.loads((tmp_path / "test" / "table.json").read_text())["orderings"]
    assert [v["gaps"] for v in verdicts] == [
        {"good − sft": pytest.approx([0.01, 0.01])},
        {"moss − sft": pytest.approx([0.02, 0.02])},
    ]


def test_a_world_of_drawable_captions_differs_in_these_alone(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "rows": {"sft": Row(title="SFT")},
        "train_samples": 24,
        "test_samples": 4,
        "sft_samples": 1,
    }
    for name, told in (("plain", False), ("drawable", True)):
        make_samples(Experiment(drawable_captions=told, **sizes), tmp_path / name)
    plain, drawn = (
        [row for path in shard_paths(tmp_path / name / "data" / "train") for row in pq.read_table(path).to_pylist()]
        for name in ("plain", "drawable")
    )
    for one, other in zip(plain, drawn, strict=True):
        assert all(one[key] == other[key] for key in ("question", "input_video", "target_video"))
        assert parse_caption(one["caption"]) == parse_caption(other["caption"])
    known = [{drawable(row["caption"]) for row in rows} for rows in (plain, drawn)]
    assert known == [{False, True}, {True}]
