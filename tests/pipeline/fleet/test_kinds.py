"""The table of pools agrees with the sections that a user writes and with the workers that it names."""

from __future__ import annotations

import inspect

import pytest

from actors.pool.protocol import Worker
from pipeline.config import load_config
from pipeline.fleet.kinds import KINDS, PoolsSection

pytestmark = pytest.mark.slow


def test_each_section_of_pools_has_its_row_in_the_order_of_a_step() -> None:
    assert list(PoolsSection.model_fields) == [*KINDS, "rewards"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("overrides", [[], ["deterministic=true", "pools.embed.workers=1"]])
def test_a_row_gives_its_workers_what_they_take(name: str, overrides: list[str]) -> None:
    config, kind = load_config("toy", overrides), KINDS[name]
    worker = kind.load()
    inspect.signature(worker).bind("a name", **kind.arguments(config))
    methods = [method for method, _ in inspect.getmembers(Worker, inspect.isfunction) if not method.startswith("_")]
    assert {"setup", "load_weights", "weights_hash"} <= set(methods)
    assert [method for method in methods if not callable(getattr(worker, method, None))] == []


def test_an_engine_may_be_asked_for_all_that_it_has_in_flight_and_more() -> None:
    pools = load_config("toy", ["pools.vlm.max_inflight=100"]).pools
    assert (KINDS["vlm"].calls(pools.vlm), KINDS["vdm"].calls(pools.vdm)) == (400, 2)


def test_prompt_conditioning_and_steps_reach_every_pool_that_needs_them() -> None:
    config = load_config(
        "toy",
        [
            "models.prompt.answer_tag='[Ans]'",
            "models.negative_prompt=blurry",
            "models.flow_grid=even",
            "video.conditioning={references: clip, time: shared}",
            "pools.embed.workers=1",
        ],
    )
    given = {name: kind.arguments(config) for name, kind in KINDS.items()}
    assert given["vlm"]["prompt"] == config.models.prompt and given["reward"]["answers"].answer == "[Ans]"
    for arguments in (given["embed"], given["vdm"]["options"]):
        assert (arguments["negative_prompt"], arguments["conditioning"]) == ("blurry", config.video.conditioning)
    assert given["vdm"]["options"]["grid"] == "even"
