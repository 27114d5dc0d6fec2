"""Charts: round ticks that cover the values, gaps for what is no number, links to steps, escaped words. Pure."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from pipeline.report.curves import (
    FIRST,
    HEIGHT,
    LEFT,
    MOST,
    RIGHT,
    WIDTH,
    chart,
    nice_ticks,
    spark,
    step_ticks,
    thinned,
)
from pipeline.tracking.metrics import find


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.13, 2.9, [0.0, 1.0, 2.0, 3.0]),
        (-3.0, 5.0, [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0]),
        (7.0, 7.0, [6.0, 6.5, 7.0, 7.5, 8.0]),
        (0.0, 0.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (1e-6, 3e-6, [1e-6, 1.5e-6, 2e-6, 2.5e-6, 3e-6]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, ticks: list[float]) -> None:
    found = nice_ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert found == pytest.approx(ticks)
    assert 2 <= len(found) <= 8


def test_ticks_of_steps_are_steps() -> None:
    assert step_ticks(0, 0) == [0]
    assert step_ticks(0, 3) == [0, 1, 2, 3]
    assert step_ticks(37, 120) == [40, 60, 80, 100, 120]


def test_a_curve_is_drawn_where_its_values_are() -> None:
    drawn = ElementTree.fromstring(chart({"a": [(0, 0.0), (10, 1.0)]}))
    (path,) = [each.attrib["d"] for each in drawn if each.attrib.get("class") == "curve"]
    assert path == f"M{LEFT:.1f} 166.0 L{WIDTH - RIGHT:.1f} 10.0"
    assert HEIGHT - 24 == 166


def test_what_is_no_number_is_left_out() -> None:
    assert "nan" not in chart({"a": [(0, math.nan), (1, 2.0), (2, math.inf), (3, 1.0)]})
    assert "no value" in chart({"a": [(0, math.nan)]}) and spark([(0, math.nan)]) == ""


def test_points_lead_to_the_steps_that_are_stored() -> None:
    drawn = chart({"a": [(0, 1.0), (1, 2.0)]}, link=lambda step: f"#stage1-{step}" if step else None)
    assert re.findall(r'href="([^"]+)"', drawn) == ["#stage1-1"]
    assert "a at step 1: 2" in drawn and "a at step 0: 1" in drawn


def test_alarms_are_bands_and_their_words_are_escaped() -> None:
    drawn = chart({"a": [(0, 1.0), (9, 2.0)]}, [(2, 5, "<b>copy</b>")], lambda step: None)
    tree = ElementTree.fromstring(drawn)
    (band,) = [each for each in tree if each.attrib.get("class") == "alarm"]
    assert band[0].text == "<b>copy</b>" and "<b>" not in drawn
    assert 100 < float(band.attrib["x"]) < 250


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(step, float(step)) for step in range(5 * MOST + 3)]
    found = thinned(points)
    assert found[0] == points[0] and found[-1] == points[-1] and MOST // 2 < len(found) <= MOST + 1
    assert thinned(points[:MOST]) == points[:MOST]


def test_times_are_drawn_without_the_first_step_where_there_are_others() -> None:
    times = next(panel for panel in FIRST if "time/step_s" in panel.metrics)
    assert times.points([(0, 36.0), (1, 1.0), (2, 1.1)]) == [(1, 1.0), (2, 1.1)]
    assert times.points([(0, 36.0)]) == [(0, 36.0)]
    assert FIRST[0].points([(0, 1.0), (1, 2.0)]) == [(0, 1.0), (1, 2.0)]


def test_the_first_charts_name_metrics_that_there_are() -> None:
    for panel in FIRST:
        for pattern in panel.metrics:
            if "*" not in pattern:
                assert find(pattern) is not None, pattern
    assert FIRST[0].chosen(["reward/x_std", "reward/x_mean", "reward/total_mean"]) == [
        "reward/total_mean",
        "reward/x_mean",
    ]
