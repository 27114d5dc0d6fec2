"""``vans plan --search``: what it finds fits, nothing beats it, and the real dispatch on a simulated clock agrees with its choice."""

from __future__ import annotations

import asyncio
import json
from itertools import product

import pytest
from typer.testing import CliRunner

from cluster.hardware import Hardware, parse_gpus, rates_of
from pipeline.cli import app
from pipeline.config import RunConfig, load_config
from pipeline.config.load import merge, parse_config
from pipeline.plan import load_models, make_plan
from pipeline.plan.balance import Demand, Split, StageDemand, best_split
from pipeline.plan.plan import with_overrides
from pipeline.plan.search import Point, pareto, search
from pipeline.stages.stage1 import Stage1
from tests.benchmarks.simulated import cluster, groups, simulate
from tests.pipeline.plan.test_plan import REAL

pytestmark = pytest.mark.slow


def point(gpus: int, run_s: float, batch: int = 1) -> Point:
    return Point(Hardware(1, gpus, 80.0), 0, batch, Split({}, {}, run_s), "")


def test_only_what_nothing_of_its_batch_beats_is_left() -> None:
    slow, dear, good, other = point(1, 900.0), point(8, 200.0), point(2, 400.0), point(2, 300.0, batch=2)
    beaten = [point(4, 400.0), point(8, 260.0), point(1, 901.0)]
    assert pareto([dear, *beaten, slow, good, other]) == (good, dear, other)  # slow costs more than good
    assert [round(each.gpu_hours * 3600) for each in (slow, good, dear)] == [900, 800, 1600]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return parse_config(merge(load_config("toy", []).model_dump(mode="json"), REAL))


@pytest.fixture(scope="module")
def found(config: RunConfig) -> tuple[Point, ...]:
    hardware = parse_gpus("8x80")
    return search(config, hardware, rates_of(hardware, None), load_models(config), batches=(1, 2))


def test_each_way_fits_by_the_plans_own_words_and_takes_as_long(config: RunConfig, found: tuple[Point, ...]) -> None:
    assert {each.staleness for each in found} == {0, 1} and {each.batch for each in found} == {1, 2}
    assert {each.hardware.gpus for each in found} >= {4, 8}
    assert [each.gpu_hours for each in found] == sorted(each.gpu_hours for each in found)
    models = load_models(config)
    for each in (*pareto(found), found[-1]):
        plan = make_plan(
            with_overrides(config, each.settings.split()), each.hardware, rates_of(each.hardware, None), models
        )
        assert plan.fits, (each.settings, plan.problems)
        seconds = sum(plan.step_s(stage) * stage.steps for stage in plan.stages)
        assert seconds == pytest.approx(each.run_s, rel=0.01), each.settings


def test_the_command_prints_the_ways_and_their_overrides() -> None:
    told = CliRunner().invoke(app, ["plan", "vans_paper", "--gpus", "2x80", "--search", "--json"])
    assert told.exit_code == 0, told.output
    ways = json.loads(told.output)
    assert ways and {way["batch"] for way in ways} == {1, 2, 4}
    assert all(way["gpu_hours"] == pytest.approx(way["gpus"] * way["run_s"] / 3600) for way in ways)
    none = CliRunner().invoke(app, ["plan", "vans_paper", "--gpus", "1x2", "--search"])
    assert none.exit_code == 1 and "no way to run it fits" in none.output


@pytest.mark.parametrize("think_s", [0.5, 4.0])
def test_the_split_that_is_found_is_nearly_the_best_of_the_simulated_ones(think_s: float) -> None:
    """All 35 splits of 8 GPUs, each a step of the real stage over the real pools whose workers sleep; the learner after it."""
    unit = {"vlm": think_s, "vdm": 0.6, "reward": 0.1, "learner": 6.0}
    prompts, size = 16, 4
    stage = StageDemand(
        "stage1",
        1,
        (
            Demand("think", "vlm", prompts, unit["vlm"]),
            Demand("draw", "vdm", prompts * size, unit["vdm"]),
            Demand("score", "reward", prompts * size, unit["reward"]),
            Demand("learn", "learner", 1.0, unit["learner"]),
        ),
        ahead=False,
    )

    def simulated(vlm: int, vdm: int, reward: int, learner: int) -> float:
        limits = {pool: {"max_batch": 1, "max_inflight": 1, "max_wait_s": 0.0} for pool in ("vlm", "vdm", "reward")}

        async def step() -> float:
            made = cluster(
                lambda pool, requests: requests * unit[pool], (vlm, vdm, reward), group_size=size, limits=limits
            )
            async with made as fleet:
                began = asyncio.get_running_loop().time()
                await groups(Stage1(fleet.config, fleet.fleet), prompts)
                return asyncio.get_running_loop().time() - began

        return simulate(step) + unit["learner"]  # one piece of work, however many ranks there are

    every = {split: simulated(*split) for split in product(range(1, 6), repeat=4) if sum(split) == 8}
    assert len(every) == 35
    chosen = best_split((stage,), 8).gpus
    took = every[tuple(chosen[role] for role in ("vlm", "vdm", "reward", "learner"))]
    assert took <= 1.15 * min(every.values()), (chosen, took, sorted(every.items(), key=lambda item: item[1])[:3])
    assert max(every.values()) > 1.5 * took  # so the choice matters
