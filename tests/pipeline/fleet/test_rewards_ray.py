"""Rewards with models in pools of their own, on Ray: scored, resized, rested, proven frozen, and refused with their reason."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.pool.errors import PoolFailed
from cluster.errors import PlacementError
from pipeline.config import RunConfig, load_config
from pipeline.fleet.open import Fleet, open_fleet
from pipeline.stages.requests import score, score_request
from tests.pipeline.stages.test_stage1 import sample

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

HERE = "tests.actors.scoring.my_judges"


def settings(clip: Path, rewards: str, weights: str, *more: str) -> RunConfig:
    overrides = [f"models.clip={clip}", f"models.rewards={rewards}", f"stage2.rewards.weights={weights}"]
    return load_config("toy", [*overrides, "stage1.rewards.weights={format: 1.0}", *more])


def opened(config: RunConfig, only: tuple[str, ...], story: Any) -> Any:
    async def run() -> Any:
        async with open_fleet(config, only=only) as fleet:
            return await story(fleet)

    return asyncio.run(asyncio.wait_for(run(), 280))


def test_two_judges_score_beside_clip_are_resized_and_stay_frozen(ray_local: None, tiny_clip_dir: Path) -> None:
    config = settings(
        tiny_clip_dir,
        f"{{bright: {{model: '{HERE}:Brightness'}}, watcher: {{model: '{HERE}:Watcher'}}}}",
        "{clip_v: 1.0, bright: 1.0, watcher: 1.0}",
        "pools.rewards={bright: {workers: 2, cpus: 0.1}}",
    )
    s = sample()

    async def story(fleet: Fleet) -> None:
        assert [pool.name for pool in fleet.pools() if pool.infos()] == ["reward", "bright", "watcher"]
        bright = fleet.named["bright"]
        before = await bright.call_all("weights_hash")
        asked = score_request(s, 0, ("clip_v", "bright", "watcher"), "", s.caption, s.target_frames)
        scores = await score(fleet, s, asked)
        assert scores.values["watcher"] == 1.0 and scores.values["clip_v"] == pytest.approx(1.0)
        assert scores.values["bright"] == pytest.approx(s.target_frames.mean() / 255, abs=1e-6)
        await bright.rest()
        bright.wake()
        assert (await score(fleet, s, asked)).values == scores.values
        await bright.resize(3, wait=True)
        after = await bright.call_all("weights_hash")
        assert len(before) == 2 and len(after) == 3 and len({*before.values(), *after.values()}) == 1

    opened(config, ("reward", "bright", "watcher"), story)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "no_file",
            r"reward 'tests.actors.scoring.my_judges:Odd' cannot be loaded: FileNotFoundError.*no/such/weights.bin",
        ),
        ("late_file", r"could not load what it needs: FileNotFoundError.*no/such/weights.bin"),
    ],
)
def test_a_load_that_fails_ends_the_run_with_its_message(
    ray_local: None, tiny_clip_dir: Path, how: str, message: str
) -> None:
    config = settings(tiny_clip_dir, f"{{odd: {{model: '{HERE}:Odd', options: {{how: {how}}}}}}}", "{odd: 1.0}")

    async def story(fleet: Fleet) -> None:
        s = sample()
        await score(fleet, s, score_request(s, 0, ("odd",), "", s.caption, s.target_frames))

    with pytest.raises(PoolFailed, match=message) as caught:
        opened(config, ("reward", "odd"), story)
    assert "Traceback" not in str(caught.value)


def test_a_pool_that_finds_no_room_is_named(ray_local: None, tiny_clip_dir: Path) -> None:
    config = settings(
        tiny_clip_dir,
        f"{{bright: {{model: '{HERE}:Brightness'}}}}",
        "{bright: 1.0}",
        "pools.rewards={bright: {gpus: 64}}",
    )
    with pytest.raises(PlacementError, match="bright"):
        opened(config, ("reward", "bright"), None)
