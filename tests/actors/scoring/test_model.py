"""A reward with a model: loaded or refused with its reason, asked in batches, held to its word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.failures import Failure, Ok
from actors.records import GroupScoreRequest, ScoreRequest
from actors.scoring.asking import ModelScorer
from actors.scoring.components import BUILT_IN, FEATURES, VIDEO_FEATURES
from actors.scoring.model import RewardLoadError, facts_of, load_model, start_model
from actors.scoring.model_worker import ModelWorker
from actors.scoring.scorer import Scorer
from tests.actors.scoring import my_judges

pytestmark = pytest.mark.slow

HERE = "tests.actors.scoring.my_judges"


def scorer(name: str, **options: Any) -> ModelScorer:
    path = f"{HERE}:{name}"
    model = load_model(path, options)
    start_model(path, model, "cpu", "float32")
    return ModelScorer("mine", path, model, facts_of(path, model), wait_s=0.0)


def answers(request_for: Any, *captions: str) -> list[ScoreRequest]:
    return [request_for(i, ("mine",), caption=caption) for i, caption in enumerate(captions)]


def test_a_batch_is_one_call_and_values_come_in_order(request_for: Any) -> None:
    judge = scorer("Brightness")
    requests = [request_for(i, ("mine",)) for i in range(5)]
    outcomes = judge.score(requests)
    assert [o.value.values["mine"] for o in outcomes] == pytest.approx(
        [r.clip.mean() / 255 for r in requests], abs=1e-6
    )
    assert len(judge.model.given) == 5
    assert [(o.value.sample_id, o.value.index) for o in outcomes] == [(r.sample_id, r.index) for r in requests]


def test_a_reward_gets_what_it_needs_and_nothing_else(request_for: Any) -> None:
    judge = scorer("Brightness")
    judge.score([request_for(0, ("mine",), question="what?", input_frames=np.zeros((3, 8, 8, 3), np.uint8))])
    (given,) = judge.model.given
    assert given.question == "" and given.input_frames is None and len(given.target_frames) == 0
    assert given.clip is not None and not given.clip.flags.writeable
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    whole, bare = request_for(0, ("mine",), question="what?", input_frames=frames), request_for(1, ("mine",))
    assert [o.value.values["mine"] for o in scorer("Watcher").score([whole, bare])] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("nan", "component 'mine' of sample {id}, answer 1, is nan"),
        (
            "eleven",
            "sample {id}, answer 1, is 11, outside the range 0…1 that tests.actors.scoring.my_judges:Odd declares",
        ),
        (
            "text",
            "sample {id}, answer 1: reward 'tests.actors.scoring.my_judges:Odd' returned '0.5'; it must return a float",
        ),
        ("raises", "raised ZeroDivisionError: this clip is odd (my_judges.py, line"),
    ],
)
def test_one_answer_that_cannot_be_judged_leaves_its_neighbours_alone(request_for: Any, how: str, cause: str) -> None:
    requests = answers(request_for, "red", "odd", "blue")
    outcomes = scorer("Odd", how=how).score(requests)
    assert [type(o) for o in outcomes] == [Ok, Failure, Ok]
    assert outcomes[1].kind == "data" and cause.format(id=requests[1].sample_id) in outcomes[1].message
    assert requests[1].sample_id in outcomes[1].message


@pytest.mark.parametrize(
    ("how", "got"), [("few", "2 values for 3 answer(s)"), ("one_number", "a float for 3 answer(s)")]
)
def test_another_number_of_values_is_a_bug_that_names_reward_and_sample(request_for: Any, how: str, got: str) -> None:
    requests = answers(request_for, "red", "green", "blue")
    outcomes = scorer("Odd", how=how).score(requests)
    assert {o.kind for o in outcomes} == {"bug"} and "reward 'mine'" in outcomes[0].message
    assert got in outcomes[0].message and requests[0].sample_id in outcomes[0].message


@pytest.mark.parametrize(("how", "cause"), [("late_file", "/no/such/weights.bin"), ("late_import", "no_such_package")])
def test_a_load_that_fails_late_stops_the_run_and_blames_no_sample(request_for: Any, how: str, cause: str) -> None:
    outcomes = scorer("Odd", how=how).score(answers(request_for, "red", "blue"))
    assert {o.kind for o in outcomes} == {"bug"} and all(o.for_people and cause in o.message for o in outcomes)
    assert "could not load what it needs" in outcomes[0].message


def test_a_function_whose_lazy_load_fails_stops_the_run_too(
    clip: Any, request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_test_reward.py").write_text(
        "def late(*, text, **_):\n    return len(open('/no/such/weights').read())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (outcome,) = Scorer(clip).score([request_for(0, ("lazy_test_reward:late",))])
    assert outcome.kind == "bug" and outcome.for_people and "/no/such/weights" in outcome.message


def test_a_judge_that_was_away_is_asked_again(request_for: Any) -> None:
    judge = scorer("Odd", how="away")
    (outcome,) = judge.score(answers(request_for, "red"))
    assert isinstance(outcome, Failure) and "in each of 3 tries, the last time ConnectionError" in outcome.message
    assert judge.score(answers(request_for, "red"))[0].value.values == {"mine": 0.5}


def test_a_group_is_judged_at_once(request_for: Any) -> None:
    group = GroupScoreRequest("s", tuple(answers(request_for, "red", "red", "blue")))
    (outcome,) = scorer("Variety").score_groups([group])
    assert [scores.values["mine"] for scores in outcome.value] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("path", "options", "cause"),
    [
        (f"{HERE}:Missing", {}, "has no Class 'Missing'"),
        ("no_module_here:Judge", {}, "cannot import 'no_module_here'"),
        (f"{HERE}:Odd", {}, "missing 1 required positional argument: 'how'"),
        (f"{HERE}:Any", {}, "with the options"),
        ("collections:OrderedDict", {}, "has neither score(requests) nor score_group(answers)"),
        ("json:dumps", {}, "is no class"),
    ],
)
def test_a_class_that_is_no_reward_is_refused_with_the_reason(path: str, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(RewardLoadError, match=r"reward '") as caught:
        load_model(path, options)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "value", "cause"),
    [
        ("needs", ("smell",), "needs ['smell']; there are text, clip, pair, question, input_video"),
        ("range", (1.0, 1.0), "holds no two values"),
        ("range", 3, "is not (least, largest)"),
    ],
)
def test_what_a_reward_says_of_itself_is_checked(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, cause: str
) -> None:
    monkeypatch.setattr(my_judges.Length, attribute, value)
    with pytest.raises(RewardLoadError) as caught:
        load_model(f"{HERE}:Length", {})
    assert cause in str(caught.value)


def test_a_set_up_that_fails_stops_the_worker_with_its_message() -> None:
    with pytest.raises(RewardLoadError, match=r"cannot be loaded: FileNotFoundError.*no/such/weights.bin"):
        ModelWorker("mine-0", "mine", f"{HERE}:Odd", {"how": "no_file"}).setup()
    with pytest.raises(RuntimeError, match="before setup"):
        ModelWorker("mine-0", "mine", f"{HERE}:Odd", {"how": "fine"}).process([])


def test_the_worker_follows_the_protocol_of_pools(request_for: Any) -> None:
    worker = ModelWorker("mine-0", "mine", f"{HERE}:Brightness")
    info = worker.setup()
    assert info.name == "mine-0" and len(info.model_hash) == 32
    requests = [request_for(i, ("mine",)) for i in range(3)]
    before = worker.process(requests)
    net = worker.scorer.model.net
    assert not net.weight.requires_grad and not net.training
    assert worker.rest() == net.weight.nbytes == 12
    assert [o.value for o in worker.process(requests)] == [o.value for o in before]
    assert worker.load_weights(3, None) == 3 and worker.weights_hash() == f"{info.model_hash}:3"
    with torch.no_grad():
        net.weight += 1.0
    assert worker.weights_hash() != f"{info.model_hash}:3", "a model that changes is seen"
    assert worker.facts() == {"mine": worker.scorer.facts} and worker.scorer.facts.drawn
    with pytest.raises(ValueError, match="takes no weights"):
        worker.load_weights(4, [1])


def test_what_functions_and_built_in_components_look_at(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_test_rewards.py").write_text(
        "def words(*, caption, **_):\n    return 0.5\n"
        "def words_alone(caption, question):\n    return float(len(question) > 0)\n"
        "def red(*, clip, **_):\n    return 0.5\n"
        "def near(*, clip, target_frames, input_frames, **_):\n    return 0.5\n"
        "def all(**everything):\n    return float(len(everything))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"needs_test_rewards:{n}" for n in ("words", "words_alone", "red", "near", "all")]
    facts = Scorer(clip).facts(names)
    words, alone, red, near, everything = (facts[name] for name in names)
    assert words.needs == {"text"} and not words.drawn and not alone.drawn and alone.needs == {"text", "question"}
    assert red.needs == {"text", "clip"} and near.needs == {"text", "clip", "pair", "input_video"}
    assert everything.needs == {"text", "clip", "pair", "question", "input_video"}
    built_in = Scorer(clip).facts([*BUILT_IN, VIDEO_FEATURES])
    assert {name for name, found in built_in.items() if not found.drawn} == {"format", "rouge_l"}
    assert set(built_in) == set(FEATURES)
