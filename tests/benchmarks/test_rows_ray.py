"""The rows that need Ray, at their smallest size: both sides run and agree where they compute the same; nothing is timed here."""

from __future__ import annotations

import importlib

import pytest

from tests.benchmarks.bench import Result

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def run(name: str) -> Result:
    module, _, function = name.partition(".")
    result = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function or "measure")("smoke")
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize("name", ["reward_pool", "publish_weights"])
def test_the_row_runs(name: str) -> None:
    result = run(name)  # whose checks refuse values that are not finite
    assert result.checks and result.figures and result.notes


@pytest.mark.chaos
@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        "data_input",
        "footage",
        "build_scale",
        "vlm_pool",
        "vlm_pool.measure_transformers",
        "vdm_pool",
        "sde_window",
        "stage2_objectives",
        "trl_step",
        "start_up",
    ],
)
def test_the_longer_row_runs(name: str) -> None:
    result = run(name)  # whose checks refuse values that are not finite
    assert result.checks and result.figures and result.notes


@pytest.mark.chaos
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_both_curves_of_the_staleness_row_are_of_real_runs() -> None:
    from tests.benchmarks.streaming import reward_curves

    found = reward_curves(2, [0])
    assert [len(curve) for curves in found.values() for curve in curves] == [2, 2]
    assert all(0 < reward < 2 for curves in found.values() for curve in curves for reward in curve)
    assert found[0][0][0] == pytest.approx(found[1][0][0], abs=1e-6)  # the first step's weights are equally old
