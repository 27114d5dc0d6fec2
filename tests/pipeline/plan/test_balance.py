"""Seconds of a step, and the split of GPUs that makes a run shortest, against hand calculations and a plain search."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from cluster.errors import PlacementError
from pipeline.plan.balance import Demand, StageDemand, best_split, shared_split

THINK = Demand("think", "vlm", units=8, unit_s=0.5, fixed_s=3.0)
DRAW = Demand("draw", "vdm", units=64, unit_s=2.0)
SCORE = Demand("score", "reward", units=64, unit_s=0.1)
LEARN = Demand("learn", "learner", units=64, unit_s=1.0)
STAGE = StageDemand("stage1", 10, (THINK, DRAW, SCORE, LEARN), ahead=False)
WORKERS = {"vlm": 1, "vdm": 4, "reward": 1, "learner": 2}


def test_units_are_dealt_out_whole() -> None:
    assert DRAW.seconds(4) == 32.0 and DRAW.seconds(5) == 26.0  # 13 clips on the one that has most
    assert THINK.seconds(1) == 7.0 and THINK.seconds(8) == 3.5 and THINK.seconds(0) == math.inf
    assert SCORE.seconds(0.5) == pytest.approx(12.8)  # half of a GPU is half as fast


def test_a_step_waits_for_what_cannot_overlap() -> None:
    assert STAGE.seconds(WORKERS) == 7.0 + 32.0 + 32.0  # scoring takes 6.4 s beside the drawing
    ahead = StageDemand("stage1", 10, STAGE.demands, ahead=True)
    assert ahead.seconds(WORKERS) == 32.0
    shared = StageDemand("stage1", 10, STAGE.demands, ahead=False, switch_s=1.5)
    assert shared.seconds(dict.fromkeys(WORKERS, 8), colocated=True) == 3.5 + 16.0 + 0.8 + 8.0 + 1.5
    assert STAGE.bottleneck(WORKERS) in (DRAW, LEARN) and STAGE.bottleneck({**WORKERS, "vdm": 8}) is LEARN


@pytest.mark.parametrize("pool", ["embed", "one that is yet to come"])
def test_any_other_pool_stands_with_the_scorers(pool: str) -> None:
    embed = Demand("embed", pool, units=8, unit_s=10.0)
    stage = StageDemand("stage1", 10, (embed, DRAW, SCORE), ahead=True)
    split = best_split([stage], 9)
    assert split.gpus["reward"] == 3 and split.gpus["vdm"] == 4  # 30 + 2.2 s beside 32 s
    assert split.step_s == {"stage1": pytest.approx(32.2)}


@pytest.mark.parametrize("seed", range(6))
def test_no_split_is_better(seed: int) -> None:
    draw = random.Random(seed)
    stages = [
        StageDemand(
            f"stage{k}",
            draw.randint(1, 1000),
            tuple(
                Demand(role, role, draw.randint(1, 64), draw.uniform(0.01, 5), draw.choice([0.0, draw.uniform(0, 5)]))
                for role in ("vlm", "vdm", "reward", "learner")
            ),
            ahead=draw.random() < 0.5,
        )
        for k in (1, 2)
    ]
    gpus, least = draw.randint(5, 12), {"learner": draw.randint(1, 2)}
    found = best_split(stages, gpus, least=least)
    assert sum(found.gpus.values()) == gpus and found.gpus["learner"] >= least["learner"]
    roles = ("vlm", "vdm", "reward", "learner")
    fastest = min(
        sum(stage.steps * stage.seconds(dict(zip(roles, counts))) for stage in stages)
        for counts in itertools.product(range(1, gpus + 1), repeat=4)
        if sum(counts) == gpus and counts[3] >= least["learner"]
    )
    assert found.run_s == pytest.approx(fastest)
    assert found.run_s == pytest.approx(sum(stage.steps * found.step_s[stage.name] for stage in stages))


def test_engines_take_whole_groups_of_gpus_and_too_few_are_refused() -> None:
    split = best_split([STAGE], 9, each={"vlm": 2})
    assert split.gpus["vlm"] % 2 == 0 and split.gpus["vlm"] >= 2
    # Four samplers would be best; of three GPUs each, there are two.
    assert [best_split([STAGE], 9, each={"vdm": n}).gpus["vdm"] for n in (1, 3)] == [4, 6]
    threes = best_split([STAGE], 9, each={"vdm": 3})
    assert threes.step_s["stage1"] == STAGE.seconds({**threes.gpus, "vdm": 2})
    with pytest.raises(PlacementError, match=r"3 GPU\(s\) are too few.*vlm 1, vdm 1, reward 1, learner 1.*colocated"):
        best_split([STAGE], 3)
    # Three ranks would be best, but those that share clips come in pairs.
    assert [best_split([STAGE], 9, each={"learner": n}).gpus["learner"] % 2 for n in (1, 2)] == [1, 0]
    assert shared_split([STAGE], 3).step_s["stage1"] == pytest.approx(4.5 + 44.0 + 2.2 + 22.0)
