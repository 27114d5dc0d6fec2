"""Totals of a group, and rewards by dotted path."""

import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.combine import combine_rewards
from rewards.custom import ARGUMENTS, call_reward, load_reward
from rewards.errors import RewardError

VALUES = {"format": [1, 1, 1, 0], "clip_v": [0.9, 0.8, 0.5, 0.6]}


def test_the_total_is_the_weighted_sum() -> None:
    total = combine_rewards(VALUES, {"format": 0.5, "clip_v": 2.0})
    assert total == pytest.approx([2.3, 2.1, 1.5, 1.2])


def test_normalised_components_count_by_weight_and_not_by_scale() -> None:
    weights = {"format": 1.0, "clip_v": 1.0}
    scaled = {"format": VALUES["format"], "clip_v": [100 * v for v in VALUES["clip_v"]]}  # type: ignore[attr-defined]
    a, b = (combine_rewards(v, weights, normalise=True) for v in (VALUES, scaled))
    assert a == pytest.approx(b, abs=2e-3)
    x = np.array(VALUES["clip_v"])
    constant = combine_rewards({"format": [1.0] * 4, "clip_v": x}, weights, normalise=True)
    assert constant == pytest.approx((x - x.mean()) / (x.std() + 1e-4)), "a constant component says nothing"


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ({"clip_v": [0.1, np.nan]}, {"clip_v": 1.0}, "members \\[1\\]"),
        ({"clip_v": [0.1, np.inf]}, {"clip_v": 1.0}, "not finite"),
        ({"clip_v": [0.1, 0.2]}, {"clip_v": 1.0, "format": 1.0}, "format"),
        ({"clip_v": [0.1, 0.2], "format": [1.0]}, {"clip_v": 1.0, "format": 1.0}, "one value per member"),
        ({"clip_v": [0.1, 0.2]}, {"clip_v": np.nan}, "weight"),
        ({"clip_v": [0.1, 0.2]}, {}, "no reward weights"),
    ],
)
def test_nothing_is_imputed(values: dict, weights: dict, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        combine_rewards(values, weights)


def test_normalised_components_by_hand() -> None:
    """x = 0, 1: mean .5, std .5, so the values are +-.5 / (.5 + 1e-4); a group of one is 0."""
    found = combine_rewards({"x": [0.0, 1.0]}, {"x": 3.0}, normalise=True)
    assert found == pytest.approx([-3 * 0.5 / 0.5001, 3 * 0.5 / 0.5001], rel=1e-12)
    assert combine_rewards({"x": [7.0]}, {"x": 3.0}, normalise=True).tolist() == [0.0]
    assert combine_rewards({"x": [0.0], "y": [np.nan]}, {"x": 1.0}).tolist() == [
        0.0
    ]  # without a weight it is not looked at
    for weight in (np.inf, np.nan):
        with pytest.raises(RewardError, match="must be finite"):
            combine_rewards({"x": [0.0, 0.0]}, {"x": weight})
    with pytest.raises(RewardError, match="one value per member"):
        combine_rewards({"x": 0.5}, {"x": 1.0})
    with pytest.raises(RewardError, match="one value per member"):
        combine_rewards({"x": [[0.5, 0.1]], "y": [[0.5, 0.1]]}, {"x": 1.0, "y": 1.0})


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "my_rewards_for_test"
    (tmp_path / f"{name}.py").write_text(
        "def redness(*, clip, **_):\n    return clip[..., 0].mean() / 255\n"
        "def demanding(clip, colour):\n    return 1.0\n"
        "def wordy(**_):\n    return 'good'\n"
        "limit = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_reward_by_dotted_path(my_rewards: str) -> None:
    arguments = dict.fromkeys(ARGUMENTS) | {"clip": np.full((2, 4, 4, 3), 51, np.uint8)}
    assert call_reward("p", load_reward(f"{my_rewards}:redness"), arguments) == pytest.approx(0.2)
    with pytest.raises(TypeError, match="must return a float"):
        call_reward("p", load_reward(f"{my_rewards}:wordy"), arguments)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (True, 1.0),
        (np.array(0.25), 0.25),
        (np.array([[0.25]]), 0.25),
        ([0.75], 0.75),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5], requires_grad=True).detach(), 0.5),
        (Fraction(1, 4), 0.25),
        (-math.inf, -math.inf),  # what is not finite is the scorer's to refuse
    ],
)
def test_whatever_is_one_number_is_taken(value: Any, expected: float) -> None:
    assert call_reward("p", lambda **_: value, {}) == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        "0.5",
        b"1",
        "",
        [],
        [0.1, 0.2],
        np.zeros(3),
        np.zeros(0),
        torch.zeros(2),
        {"r": 1.0},
        1j,
        object(),
        ("0.5",),
    ],
)
def test_whatever_is_not_one_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"reward 'a:b' returned .*; it must return a float"):
        call_reward("a:b", lambda **_: value, {})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("redness", "package.module:function"),
        ("no_such_module_here:redness", "cannot import"),
        ("MODULE:blueness", "no function 'blueness'"),
        ("MODULE:limit", "no function 'limit'"),
        ("MODULE:demanding", "keyword arguments"),
        ("os.path; rm:x", "package.module:function"),
    ],
)
def test_a_wrong_path_says_what_is_wrong(my_rewards: str, path: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(path.replace("MODULE", my_rewards))
