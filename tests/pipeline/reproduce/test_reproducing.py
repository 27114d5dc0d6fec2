"""The table's bookkeeping: rows, overrides, spreads over seeds, verdicts, curves and the report, without running anything."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cluster.errors import ConfigError
from pipeline.config import load_config
from pipeline.data.toy.shards import ensure_toy
from pipeline.reproduce import Experiment, load_experiment, quickened
from pipeline.reproduce.report import write_report
from pipeline.reproduce.reproducing import RowResult, _claim, _claim_data, _Seed
from pipeline.reproduce.spec import Ordering, Row
from pipeline.reproduce.statistics import Figures, links, over_seeds, verdict


def seeds(**rows: list[float]) -> list[Figures]:
    """Figures of as many seeds as each row has values, all of them CLIP-V over all samples."""
    count = len(next(iter(rows.values())))
    return [{key: {"all": {"clip_v": values[s]}} for key, values in rows.items()} for s in range(count)]


def order(*rows: str, metric: str = "clip_v") -> Ordering:
    return Ordering(claim="c", metric=metric, rows=list(rows))  # type: ignore[arg-type]


def test_the_bundled_table_has_the_papers_rows_and_every_row_is_a_valid_run(tmp_path: Path) -> None:
    table = load_experiment()
    assert sum(row.shown for row in table.rows.values()) == 13 and table.rows["joint"].paper.clip_v == (0.8021, 0.7872)
    seed = _Seed(table, tmp_path, 1, "test", Console(), {key: RowResult(key, vlm="v", vdm="d") for key in table.rows})
    for row in table.rows.values():
        if row.set is not None:
            config = seed.config(row, tmp_path / "row", "test")
            assert config.seed == 1 and config.data.eval == tmp_path / "data" / "test"
            assert config.stage1.steps or config.stage2.steps
    assert seed.config(table.rows["joint"], tmp_path / "row", "test").models.vlm_adapter == "v"


def test_a_row_brings_along_what_it_is_made_of() -> None:
    table = load_experiment()
    assert table.needed(["without_r_c2"]) == ["sft", "stage1", "without_r_c2"]
    assert table.needed(["cascaded"]) == ["sft", "vlm_alone", "vdm_alone", "cascaded"]
    assert table.needed([]) == list(table.rows)
    with pytest.raises(ConfigError, match="no row nonsense; the rows are sft"):
        table.needed(["nonsense"])


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ({"sft": {"title": "SFT"}, "b": {"title": "b", "vlm": "c", "set": []}}, "not a row above it"),
        ({"sft": {"title": "SFT"}, "b": {"title": "b", "sft_like": ["sft"], "set": []}}, "sft_like goes with neither"),
        ({"b": {"title": "b"}}, "baseline='sft' is not a row"),
    ],
)
def test_contradictions_of_an_experiment_are_refused(rows: dict, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Experiment(rows=rows)


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("rows: {sft: {title: SFT, stepz: 3}}\n")
    with pytest.raises(ConfigError, match=r"rows\.sft\.stepz"):
        load_experiment(tmp_path / "e.yaml")


def test_a_claim_of_the_best_row_is_about_all_shown_rows_but_those_besides() -> None:
    best = Ordering(claim="c", metric="clip_t", best="joint", besides=["ours"])
    assert best.pairs(["sft", "joint", "ours"]) == [("joint", "sft")] and best.rests_on() == {"joint"}
    with pytest.raises(ValueError, match="besides goes with best"):
        Ordering(claim="c", metric="clip_t", rows=["joint", "sft"], besides=["ours"])
    with pytest.raises(ValueError, match=r"names unknown rows \['ours'\]"):
        Experiment(rows={"sft": Row(title="SFT")}, baseline="sft", orderings=[best.model_copy(update={"best": "sft"})])


def test_an_order_holds_only_beyond_the_spread_between_seeds() -> None:
    clear = links(order("joint", "sft"), seeds(joint=[0.8, 0.81, 0.79], sft=[0.5, 0.52, 0.5]), ())
    assert verdict(clear) == "holds" and clear[0].gaps == pytest.approx((0.3, 0.29, 0.29))
    noisy = links(order("joint", "sft"), seeds(joint=[0.9, 0.4, 0.9], sft=[0.5, 0.7, 0.6]), ())
    assert verdict(noisy) == "within the spread"
    wrong = links(order("joint", "sft"), seeds(joint=[0.4, 0.4], sft=[0.5, 0.5]), ())
    assert verdict(wrong) == "does not hold"
    assert verdict(
        links(order("joint", "stage1", "sft"), seeds(joint=[1.0, 1.0], stage1=[0.5, 0.5], sft=[0.6, 0.6]), ())
    ) == (
        "does not hold"  # the weakest link decides
    )
    assert verdict(links(order("joint", "gone"), seeds(joint=[1.0]), ())) == "not measured"
    assert verdict(links(order("joint", "sft"), seeds(joint=[0.9], sft=[0.1]), ())) == "one seed only"


def test_a_lower_frechet_distance_is_better() -> None:
    figures: list[Figures] = [{"a": {"all": {"frechet": 0.1}}, "b": {"all": {"frechet": 0.3}}}]
    assert links(order("a", "b", metric="frechet"), figures, ())[0].gaps == pytest.approx((0.2,))


def test_spread_is_the_sample_standard_deviation() -> None:
    found = over_seeds(seeds(joint=[0.5, 0.7, 0.9]), "joint", "all", "clip_v")
    assert found is not None and found.mean == pytest.approx(0.7) and found.std == pytest.approx(0.2)
    assert found.text() == "0.700 ± 0.200"
    assert over_seeds(seeds(joint=[0.5]), "joint", "all", "rouge_l") is None


def test_a_folder_keeps_to_one_dataset(tmp_path: Path) -> None:
    ensure_toy(tmp_path / "data", 3, 2)
    _claim_data(tmp_path)
    _claim_data(tmp_path)
    shutil.rmtree(tmp_path / "data")
    ensure_toy(tmp_path / "data", 3, 2, seed=1)
    with pytest.raises(ConfigError, match="made of other data"):
        _claim_data(tmp_path)


def test_a_folder_keeps_to_one_experiment(tmp_path: Path) -> None:
    table = load_experiment()
    _claim(tmp_path, table)
    _claim(tmp_path, table)
    with pytest.raises(ConfigError, match="another experiment"):
        _claim(tmp_path, quickened(table))


def finished(out: Path, table: Experiment, count: int) -> None:
    """What ``count`` seeds leave behind, with CLIP-V rising from row to row."""
    for seed in range(count):
        systems = {}
        for number, key in enumerate(table.rows):
            folder = out / f"seed{seed}" / key
            folder.mkdir(parents=True)
            curve = {"reward/clip_v_mean": [(s, 0.1 * s + seed) for s in range(4)]}
            trained = {"stage1": curve} if table.rows[key].set is not None else {}
            RowResult(key, stages=trained, wall_s={"stage1": 12.0} if trained else {}).write(folder / "row.json")
            metrics = {"clip_v": {"value": 0.5 + 0.01 * number}, "rouge_l": {"value": 0.3}}
            systems[key] = {"metrics": dict.fromkeys(("all", "procedural", "predictive"), metrics)}
        target = out / f"seed{seed}" / "test"
        target.mkdir()
        counts = {"all": 8, "procedural": 4, "predictive": 4}
        (target / "table.json").write_text(json.dumps({"systems": systems, "extractor": "x", "samples": counts}))


def test_the_report_sets_ours_beside_the_papers(tmp_path: Path) -> None:
    table = load_experiment()
    finished(tmp_path, table, 2)
    path = write_report(
        table, tmp_path, seeds=[0, 1], keys=list(table.rows), split="test", command="vans reproduce --seeds 2"
    )
    text = path.read_text()
    joint = next(line for line in text.splitlines() if line.startswith("| Joint-GRPO "))
    assert "0.560 ± 0.000 / 0.560 ± 0.000" in joint and "0.8021 / 0.7872" in joint
    assert "`vans reproduce --seeds 2`" in text and "**does not hold**" in text and "FVD[x]" in text
    values = json.loads((tmp_path / "test" / "table.json").read_text())
    assert values["rows"]["joint"]["all"]["clip_v"] == {"mean": pytest.approx(0.56), "std": 0.0, "n": 2}
    assert {o["verdict"] for o in values["orderings"]} <= {
        "holds",
        "does not hold",
        "not measured",
        "within the spread",
    }
    picture = np.asarray(Image.open(tmp_path / "test" / "curves.png"))
    assert picture.shape[0] > 200 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20


def test_all_in_one_judges_by_the_rewards_of_both_stages_and_asks_for_two_learners() -> None:
    from pipeline.fleet.open import placement_plan
    from pipeline.stages.all_in_one import AllInOne

    config = load_config("toy", ["training=all_in_one", "stage1.rewards.weights.clip_v=0.5"])
    stage = AllInOne(config, fleet=None)  # type: ignore[arg-type]
    assert stage.section.rewards.weights == {"format": 1.0, "rouge_l": 1.0, "clip_v": 0.5, "clip_score": 1.0}
    assert not stage.section.dedupe and stage.section.steps == config.stage1.steps  # type: ignore[attr-defined]
    ranks = {ask.role: ask.count for ask in placement_plan(config).asks}
    assert ranks["learner"] == 2 * config.learner.ranks


def test_a_row_that_fails_is_told_and_takes_only_the_rows_made_of_it_along(tmp_path: Path) -> None:
    rows = {
        "sft": {"title": "SFT"},
        "bad": {"title": "bad", "set": ["data.train=./no-such-folder"]},
        "child": {"title": "child", "vlm": "bad"},
        "good": {"title": "good", "vlm": "sft"},
    }
    one = _Seed(Experiment(rows=rows), tmp_path, 0, "test", Console())  # type: ignore[arg-type]
    found = {key: one.attempt(key) for key in rows}
    assert found["sft"] is None and found["good"] is None
    assert "no-such-folder" in str(found["bad"])
    assert found["child"] == "it is made of bad, which failed"
    assert set(one.results) == {"sft", "good"} and not (tmp_path / "seed0" / "bad" / "row.json").exists()


def test_a_seed_is_measured_again_only_where_a_row_or_an_answer_came_after_its_table(tmp_path: Path) -> None:
    rows = {"sft": {"title": "SFT"}, "b": {"title": "b"}}
    one = _Seed(Experiment(rows=rows), tmp_path, 0, "test", Console())  # type: ignore[arg-type]
    one.results = {"sft": RowResult("sft")}
    answers, table = (
        tmp_path / "seed0" / "sft" / "test" / "predictions.jsonl",
        tmp_path / "seed0" / "test" / "table.json",
    )
    for path, text in ((answers, ""), (table, json.dumps({"systems": {"sft": {}}}))):
        assert not one.judged()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    os.utime(answers, (1.0, 1.0))
    assert one.judged()
    os.utime(table, (0.5, 0.5))
    assert not one.judged(), "asked again since"
    os.utime(table, (2.0, 2.0))
    one.results |= {"b": RowResult("b")}
    assert one.judged() is False and _Seed(one.experiment, tmp_path, 1, "test", Console()).judged() is False
