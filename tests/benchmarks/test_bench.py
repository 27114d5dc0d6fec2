"""The benchmarks' own arithmetic: turns, medians, bars, and the table."""

from __future__ import annotations

import math

import pytest

from tests.benchmarks.bench import Check, Result, interleave, number, ratios
from tests.benchmarks.run import ROWS, measure_apart, table


def test_sides_take_turns_and_the_warm_up_is_left_out() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    rounds = interleave([lambda: side("a"), lambda: side("b")], 2, warm_up=1)
    assert "".join(order) == "abbaab"
    assert rounds == [(4.0, 3.0), (5.0, 6.0)]
    assert ratios(rounds) == (4 / 3, 5 / 6)


@pytest.mark.parametrize(
    ("sign", "values", "met"),
    [("≥", (0.9, 1.2, 1.0), True), ("≥", (0.9, 0.9, 2.0), False), ("≤", (0.9, 0.9, 2.0), True), ("≤", (1.1,), False)],
)
def test_the_median_is_held_to_the_bar(sign: str, values: tuple[float, ...], met: bool) -> None:
    assert Check("ratio", values, sign, 1.0).met is met  # type: ignore[arg-type]


def test_what_was_not_measured_is_refused() -> None:
    for values in ((), (math.nan,), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="no measurements"):
            Check("ratio", values, "≥", 1.0)


def test_a_result_survives_json_and_stands_in_the_table() -> None:
    result = Result((Check("tokens/s", (1.5, 1.25, 2.0), "≥", 1.3), Check("first", (3.5,), "≤", 3.0, "s")), {"x": 2.0})
    again = Result.from_json(result.as_json())
    assert again == result
    lines = table({1: result.as_json(), 9: {"error": "boom"}})
    assert "| tokens/s: 1.50 (1.25–2.00) × | ≥ 1.3 × | yes |" in lines[2]
    assert "| first: 3.50 s | ≤ 3 s | **no** |" in lines[3]
    assert "could not be measured" in lines[4]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (123.4, "123"), (5e4, "50,000")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_row_that_fails_tells_why_and_is_not_a_figure() -> None:
    import dataclasses

    plain = measure_apart(dataclasses.replace(ROWS[0], number=99), "smoke", timeout_s=60)
    assert "exit status" in plain["error"]
    assert "KeyError: 99" in plain["error"]
