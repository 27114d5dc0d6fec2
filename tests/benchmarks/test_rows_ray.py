"""The rows that need Ray, at their smallest size: both sides run and agree where they compute the same; nothing is timed here."""

from __future__ import annotations

import importlib

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def run(name: str) -> None:
    module, _, function = name.partition(".")
    result = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function or "measure")("smoke")
    assert result.checks and result.figures and result.notes


@pytest.mark.parametrize("name", ["reward_pool", "publish_weights"])
def test_the_row_runs(name: str) -> None:
    run(name)


@pytest.mark.chaos
@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    ["data_input", "vlm_pool", "vlm_pool.measure_transformers", "vdm_pool", "sde_window", "trl_step", "start_up"],
)
def test_the_longer_row_runs(name: str) -> None:
    run(name)
