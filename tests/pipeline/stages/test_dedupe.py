"""Equal captions of a group are drawn once, and nothing else changes: `dedupe` on and off give the same scores and clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from actors.records import Clip, Completion
from pipeline.stages.groups import Group
from pipeline.stages.stage1 import Stage1
from tests.benchmarks import simulated
from tests.benchmarks.simulated import FRAMES, cluster, sample, simulate

CAPTIONS = ("a circle moves up", "a circle moves up", None, "a square moves up", "a circle moves up")


def complete(request: Any, version: int) -> list[Completion]:
    tokens, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
    texts = ["malformed" if c is None else f"<think>a</think><ans>{c}</ans>" for c in CAPTIONS]
    return [Completion(text, tokens, logprobs, "stop", version) for text in texts]


def draw(request: Any, version: int) -> Clip:
    """As the artist does: of the caption and the noise alone, whoever of the group asks."""
    rng = np.random.default_rng([request.noise_seed % 2**32, len(request.caption)])
    return Clip(
        request.sample_id, request.index, request.caption, rng.integers(0, 256, FRAMES.shape, np.uint8), version
    )


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], tuple[Group, int]]:
    monkeypatch.setitem(simulated.ANSWERS, "vlm", complete)
    monkeypatch.setitem(simulated.ANSWERS, "vdm", draw)

    def run(dedupe: bool) -> tuple[Group, int]:
        async def work() -> tuple[Group, int]:
            stage = {"dedupe": str(dedupe).lower()}
            async with cluster(lambda _pool, n: float(n), (1, 2, 1), group_size=len(CAPTIONS), **stage) as found:
                group = await Stage1(found.config, found.fleet).group(sample(0), "0")
                assert group is not None
                return group, found.transports["vdm"].requests

        return simulate(work)

    return run


def test_on_and_off_agree_and_on_draws_each_caption_once(story: Callable[[bool], tuple[Group, int]]) -> None:
    (once, drawn_once), (each, drawn_each) = story(True), story(False)
    assert (drawn_once, drawn_each) == (2, 4)
    assert [m.index for m in once.members] == [m.index for m in each.members] == list(range(len(CAPTIONS)))
    for a, b in zip(once.members, each.members, strict=True):
        assert a.caption == b.caption and a.scores.values == b.scores.values
        assert (a.clip is None) == (b.clip is None)
        if a.clip is not None and b.clip is not None:
            assert np.array_equal(a.clip.frames, b.clip.frames)
