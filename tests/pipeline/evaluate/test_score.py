"""Evaluation of predictions: the table, its intervals, the folder format and the contact sheet."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actors.records import Sample, ScoreRequest, Scores
from actors.scoring.clip import ClipScorer
from actors.scoring.video import TorchScriptExtractor
from cluster.errors import CheckpointError, ConfigError, DataError
from pipeline.config import RunConfig
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.toy import make_sample
from pipeline.evaluate.bootstrap import Estimate, estimate
from pipeline.evaluate.evaluation import read_systems, run_evaluation
from pipeline.evaluate.predictions import Prediction, read_predictions, write_predictions
from pipeline.evaluate.score import score_predictions
from pipeline.evaluate.sheets import evaluation_sheet
from pipeline.evaluate.table import METRICS, EvaluationTable
from tests.pipeline.evaluate.local import evaluate_predictions, truth_as_predictions

pytestmark = pytest.mark.slow

COUNT = 8


@pytest.fixture(scope="module")
def clip(tiny_clip_dir: Path) -> ClipScorer:
    return ClipScorer(tiny_clip_dir, name="tiny-clip")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    toys = [make_sample(i, "test") for i in range(COUNT)]
    return [
        Sample(t.id, t.kind, t.question, t.caption, t.input_frames, t.target_frames, meta=t.meta_json) for t in toys
    ]


@pytest.fixture(scope="module")
def frozen(samples: list[Sample]) -> list[Prediction]:
    """A system that repeats the last input frame, and leaves the first question unanswered."""
    stills = [Prediction(s.id, s.caption, "junk", np.repeat(s.input_frames[-1:], 9, axis=0)) for s in samples[1:]]
    return [Prediction(samples[0].id, "", "junk"), *stills]


@pytest.fixture(scope="module")
def table(samples: list[Sample], frozen: list[Prediction], clip: ClipScorer) -> EvaluationTable:
    return evaluate_predictions({"frozen": frozen, "truth": truth_as_predictions(samples)}, samples, clip)


def test_ground_truth_is_the_ceiling_of_every_metric(table: EvaluationTable) -> None:
    figures = table.figures("truth")
    for name in ("rouge_l", "clip_v", "follow", "event", "faithful", "format", "answered", "bleu_1", "bleu_4"):
        assert figures[name] == pytest.approx(1.0), name
    assert figures["frechet"] == pytest.approx(0.0, abs=1e-6) and figures["n"] == COUNT
    assert figures["motion_ratio"] == pytest.approx(1.0) and figures["copy_excess"] == pytest.approx(0.0)
    assert 0.0 <= figures["drawable"] < 1.0, "ground truth uses words that the artist does not know"
    assert table.alarms("truth") == ()


def test_a_frozen_system_loses_and_an_unanswered_question_counts(table: EvaluationTable) -> None:
    frozen, truth = table.figures("frozen"), table.figures("truth")
    assert frozen["follow"] == 0.0 and frozen["faithful"] == 0.0 and frozen["format"] == 0.0
    assert frozen["rouge_l"] == frozen["event"] == frozen["answered"] == pytest.approx((COUNT - 1) / COUNT)
    assert frozen["clip_v"] < truth["clip_v"] and frozen["frechet"] > truth["frechet"]
    assert any(text.startswith("motion") for text in table.alarms("frozen"))
    assert table.systems["frozen"].metrics["all"]["clip_v"].n == COUNT - 1, "there is no CLIP-V without a video"
    change = table.difference("truth", "frozen", "follow")
    assert change is not None and (change.value, change.n) == (1.0, COUNT)


def test_kinds_stand_apart_and_together(table: EvaluationTable, samples: list[Sample]) -> None:
    assert table.samples == {"all": COUNT, "procedural": COUNT // 2, "predictive": COUNT // 2}
    metrics = table.systems["frozen"].metrics
    apart = [metrics[kind]["rouge_l"].value for kind in ("procedural", "predictive")]
    assert metrics["all"]["rouge_l"].value == pytest.approx(np.mean(apart)) and apart[0] != apart[1]


def test_the_table_as_markdown_and_json(table: EvaluationTable, tmp_path: Path) -> None:
    table.write(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "FVD[tiny-clip-frames-16]" in text and "| FVD " not in text
    assert f"all N={COUNT}" in text and "not more clips than features (all, procedural, predictive)" in text
    assert "**alarm** frozen" in text and "procedural / predictive" in text
    widths = {line.count("|") for line in text.split("\n\n")[1].splitlines()}
    assert widths == {4}, "metric and two systems"
    assert "**truth − frozen**, sample by sample" in text and f"| {COUNT} of {COUNT} |" in text
    stored = json.loads((tmp_path / "table.json").read_text())
    truth = stored["systems"]["truth"]
    assert truth["metrics"]["all"]["rouge_l"] == {"value": 1.0, "n": COUNT, "low": 1.0, "high": 1.0}
    assert truth["frechet"]["all"]["name"] == "FVD[tiny-clip-frames-16]" and len(truth["answers"]) == COUNT
    for system in stored["systems"].values():
        for group in system["metrics"].values():
            assert all(e["low"] is not None and e["low"] <= e["high"] for e in group.values()), "each has an interval"
    compared = stored["comparison"]
    assert (compared["baseline"], compared["system"]) == ("frozen", "truth")
    assert set(compared["differences"]) == {"all", "procedural", "predictive"}
    assert compared["differences"]["all"]["follow"]["value"] == 1.0


def test_two_of_three_systems_are_compared_as_asked(
    samples: list[Sample], frozen: list[Prediction], clip: ClipScorer
) -> None:
    truth = truth_as_predictions(samples)
    systems = {"truth": truth, "frozen": frozen, "again": truth}
    table = evaluate_predictions(systems, samples, clip, compare=("truth", "again"))
    assert set(table.comparison["all"]) >= {*METRICS, "motion_ratio", "copy_excess"}
    for found in table.comparison.values():
        for metric, d in found.items():
            assert (d.value, d.low, d.high, d.differ) == (0.0, 0.0, 0.0, 0), metric
    with pytest.raises(ConfigError, match="cannot compare 'missing': the systems are truth, frozen, again"):
        evaluate_predictions(systems, samples, clip, compare=("truth", "missing"))


class MeanAndSpread(torch.nn.Module):
    """Features as the I3D export has them: probabilities, unless it is told to return features."""

    def forward(self, x: torch.Tensor, rescale: bool = True, return_features: bool = False) -> torch.Tensor:
        found = torch.cat([x.mean(dim=[3, 4]).flatten(1), x.std(dim=[3, 4]).flatten(1)], dim=1)
        return (found * 9.0 if rescale else found) if return_features else found.softmax(1)


def test_another_extractor_names_the_metric_and_warns_of_few_clips(
    samples: list[Sample], frozen: list[Prediction], clip: ClipScorer, tmp_path: Path
) -> None:
    torch.jit.script(MeanAndSpread()).save(str(tmp_path / "net.pt"))
    systems = {"frozen": frozen, "truth": truth_as_predictions(samples)}
    for name, heading in (("net", "FVD[net] ↓"), ("i3d", "FVD ↓")):
        extractor = TorchScriptExtractor(tmp_path / "net.pt", name, size=16)
        table = evaluate_predictions(systems, samples, clip, video=extractor)
        text = table.markdown()
        assert f"| {heading}" in text and "tiny-clip" not in text
        assert f"(N={COUNT})" in text and f"(N={COUNT - 1})" in text
        assert f"**warning** {heading[:-2]} of truth: not more clips than features" in text
        assert table.systems["truth"].frechet["all"].dim == extractor.dim == 3 * 10 * 2
        assert table.figures("truth")["frechet"] == pytest.approx(0.0, abs=1e-9)
        assert table.figures("frozen")["frechet"] > 1e-3
    inside = extractor(samples[0].target_frames)
    pixels = samples[0].target_frames[0].astype(np.float32) / 127.5 - 1
    assert inside[0] == pytest.approx(pixels[..., 0].mean(), abs=0.02), "features, of pixels that nobody scaled again"


def test_systems_are_named_and_mistakes_are_told_before_anything_starts(
    samples: list[Sample], frozen: list[Prediction], tmp_path: Path
) -> None:
    for name in ("one", "two", "a=b"):
        write_predictions(tmp_path / name, frozen[:1], fps=8.0)
    assert list(read_systems([str(tmp_path / "one"), f"cascade={tmp_path}/two"])) == ["one", "cascade"]
    assert list(read_systems([str(tmp_path / "a=b")])) == ["a=b"], "a folder that is there is no name=path"
    out, config = tmp_path / "out", RunConfig()
    folder = str(tmp_path / "one")
    for options, error, message in (
        ({"predictions": [folder, folder]}, ConfigError, r"two systems are called 'one'.*other="),
        ({"predictions": [f"={folder}"]}, ConfigError, "expected a path, or name=path"),
        ({"predictions": [str(tmp_path)]}, DataError, "holds no predictions.jsonl"),
        ({"predictions": [folder], "compare": ("one", "two")}, ConfigError, "cannot compare 'two'"),
        ({"compare": ("SFT", "pair")}, ConfigError, "cannot compare 'SFT': the systems are pair"),
        ({"fvd_extractor": "i3d=none.pt"}, CheckpointError, "none.pt: no such file"),
    ):
        with pytest.raises(error, match=message):
            run_evaluation(config, out, **options)  # type: ignore[arg-type]
    assert not out.exists()


def test_several_answers_to_one_question_are_averaged_per_sample(samples: list[Sample], clip: ClipScorer) -> None:
    truth = truth_as_predictions(samples[:2])
    extra = [Prediction(samples[0].id, "nonsense", "", None, index=i) for i in (1, 2, 3)]
    table = evaluate_predictions({"sampled": [*truth, *extra]}, samples[:2], clip)
    assert table.figures("sampled")["rouge_l"] == pytest.approx((0.25 + 1.0) / 2)
    assert table.systems["sampled"].metrics["all"]["rouge_l"].n == 2


def mean_estimate(values: list[float], seed: int) -> Estimate:
    array = np.array(values)
    return estimate(lambda draws: array[draws].mean(axis=1), len(values), seed)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [
        (e := mean_estimate(rng.normal(0.5, 0.2, size=60).tolist(), seed=i)).low <= 0.5 <= e.high for i in range(300)
    ]
    assert 0.90 <= np.mean(covered) <= 0.98
    assert mean_estimate([1.0, 0.0, 1.0], 7) == mean_estimate([1.0, 0.0, 1.0], 7)
    assert mean_estimate([0.3], 0).low is None


def test_a_system_may_not_choose_its_questions(samples: list[Sample], clip: ClipScorer) -> None:
    with pytest.raises(DataError, match=r"'picky' leaves out 1 of 8 samples"):
        evaluate_predictions({"picky": truth_as_predictions(samples)[1:]}, samples, clip)


@pytest.mark.parametrize("truth", ["\U0001f408", "?!"])
def test_a_metric_that_one_answer_cannot_have_is_left_out_there_and_told(
    samples: list[Sample], clip: ClipScorer, truth: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    odd = [replace(samples[0], caption=truth), *samples[1:]]
    table = evaluate_predictions({"truth": truth_as_predictions(odd)}, odd, clip)
    estimates = table.systems["truth"].metrics["all"]
    assert (estimates["rouge_l"].n, estimates["rouge_l"].value) == (COUNT - 1, pytest.approx(1.0))
    assert estimates["clip_v"].n == estimates["frechet"].n == estimates["motion_ratio"].n == COUNT
    assert "letters or digits" in table.systems["truth"].answers[0].lost["rouge_l"]
    assert f"rouge_l of truth cannot be computed for 1 of {COUNT} answers" in table.markdown()
    assert "rouge_l of 1 answers cannot be computed" in caplog.text
    table.write(tmp_path)
    answers = json.loads((tmp_path / "table.json").read_text())["systems"]["truth"]["answers"]
    assert [list(a.get("lost", {})) for a in answers] == [["rouge_l"], *[[]] * (COUNT - 1)]


def test_a_metric_that_no_answer_can_have_stops_the_evaluation(samples: list[Sample], clip: ClipScorer) -> None:
    odd = [replace(s, caption="\U0001f408") for s in samples]
    with pytest.raises(DataError, match=r"rouge_l cannot be computed for any answer, .*letters or digits"):
        evaluate_predictions({"truth": truth_as_predictions(odd)}, odd, clip)


async def _failing(request: ScoreRequest) -> Scores:
    raise DataError("the scorer is broken")


def test_a_scorer_that_fails_fails_the_evaluation(samples: list[Sample]) -> None:
    import asyncio

    with pytest.raises(DataError, match="the scorer is broken"):
        asyncio.run(score_predictions({"x": truth_as_predictions(samples)}, samples, _failing, extractor="x"))


def test_a_folder_of_predictions_scores_like_the_frames(
    samples: list[Sample], clip: ClipScorer, table: EvaluationTable, frozen: list[Prediction], tmp_path: Path
) -> None:
    for name, predictions in (("frozen", frozen), ("truth", truth_as_predictions(samples))):
        write_predictions(tmp_path / name, predictions, fps=8.0)
        found = read_predictions(tmp_path / name)
        assert [(p.id, p.caption, p.text, p.index) for p in found] == [
            (p.id, p.caption, p.text, p.index) for p in predictions
        ]
        again = evaluate_predictions({name: found}, samples, clip).figures(name)
        expected = table.figures(name)
        for metric in ("rouge_l", "follow", "faithful", "drawable", "format", "answered", "clip_v"):
            assert again[metric] == pytest.approx(expected[metric], abs=2e-3), metric
    write_predictions(tmp_path / "truth", found, fps=8.0)  # a second run replaces the first, from files to files


LINE = '{"id": "a", "caption": "c", "video": null}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (LINE + "{", "line 2: not JSON"),
        ('{"id": "a", "caption": "c"}', "at least the keys id, caption and video"),
        ('{"id": "a", "caption": "c", "video": null, "score": 1}', r"unknown keys \['score'\]"),
        ('{"id": 3, "caption": "c", "video": null}', "'id' must be text"),
        ('{"id": "a", "caption": null, "video": null}', "'caption' must be text"),
        ('{"id": "a", "caption": "c", "video": null, "index": -1}', "'index' must be a whole number"),
        (LINE + LINE, "stands there twice"),
        ('{"id": "a", "caption": "c", "video": "videos/a.mp4"}', "there is no video"),
        ('{"id": "a", "caption": "c", "video": "../secret.mp4"}', "plain path inside"),
        ('{"id": "a", "caption": "c", "video": "videos/../../secret.mp4"}', "plain path inside"),
        ('{"id": "a", "caption": "c", "video": "SECRET"}', "plain path inside"),
        ('{"id": "a", "caption": "c", "video": "http://host/a.mp4"}', "plain path inside"),
        ('{"id": "a", "caption": "c", "video": "link.mp4"}', "leads outside"),
        ('{"id": "a", "caption": "c", "video": 7}', "path relative"),
    ],
)
def test_a_bad_folder_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"private")
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "link.mp4").symlink_to(secret)
    (folder / "predictions.jsonl").write_text(text.replace("SECRET", str(secret)))
    with pytest.raises(DataError, match=message):
        read_predictions(folder)


def test_a_video_that_cannot_be_decoded_is_named_and_costs_the_other_answers_nothing(
    samples: list[Sample], clip: ClipScorer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = samples[:2]
    write_predictions(tmp_path, truth_as_predictions(asked), 8.0)
    whole = evaluate_predictions({"x": read_predictions(tmp_path)}, asked, clip)
    predictions = read_predictions(tmp_path)
    first, second = (prediction.video for prediction in predictions)
    assert first is not None and second is not None
    first.write_bytes(b"this is no video")
    table = evaluate_predictions({"x": predictions}, asked, clip)
    assert "1 of 2 answers of 'x'" in caplog.text and first.name in caplog.text
    broken, good = table.systems["x"].answers
    assert broken.values["answered"] == 0 and "clip_v" not in broken.values
    assert good.values == whole.systems["x"].answers[1].values
    assert evaluation_sheet(asked, {"x": predictions}, tmp_path / "s.png", table=table).is_file()
    second.write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 2 answers of 'x' .*\.mp4"):
        evaluate_predictions({"x": predictions}, asked, clip)
    with pytest.raises(DataError, match="holds no predictions"):
        read_predictions(tmp_path / "elsewhere")


def test_the_sheet_shows_every_frame_that_fits(
    samples: list[Sample], frozen: list[Prediction], table: EvaluationTable, tmp_path: Path
) -> None:
    systems = {"frozen": frozen, "truth": truth_as_predictions(samples)}
    path = evaluation_sheet(samples, systems, tmp_path / "sheets" / "s.png", table=table, count=2, title="held out")
    picture = np.asarray(Image.open(path))
    # The pixels of a known frame, enlarged three times, stand in the sheet unchanged.
    target = samples[0].target_frames[-1].repeat(3, axis=0).repeat(3, axis=1)
    corners = [picture[y : y - 95 or None, x : x - 95 or None] == target[y, x] for y in (0, 95) for x in (0, 95)]
    places = np.argwhere(np.logical_and.reduce([c.all(axis=-1) for c in corners]))
    assert any(np.array_equal(picture[y : y + 96, x : x + 96], target) for y, x in places)


def test_sheets_take_real_sizes_long_text_and_missing_videos(tmp_path: Path) -> None:
    clip = np.zeros((33, 352, 640, 3), np.uint8)
    strips = [Strip("input", clip), Strip("x\n" + "pours " * 60 + "w" * 200, clip, "note"), Strip("y\nsaid", None)]
    picture = Image.open(contact_sheet([("why? " * 80, strips)], tmp_path / "s.png"))
    assert picture.width < 1400 and picture.height < 1200
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "none.png")
