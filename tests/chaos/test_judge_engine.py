"""A judge that vLLM serves in the reward's own worker, with the tiny thinker: it is no judge, and no value is made up for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actors.failures import Failure, Ok
from actors.records import ScoreRequest
from actors.scoring.model_worker import ModelWorker

pytestmark = [pytest.mark.chaos, pytest.mark.vllm]

THINKER = Path(__file__).parents[2] / "pipeline" / "assets" / "tiny" / "vlm"


def requests() -> list[ScoreRequest]:
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    return [
        ScoreRequest(f"s{i}", 0, ("judge",), "", "it rises", "it rises", frames, frames[-1], frames + i, "what next?")
        for i in range(3)
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("structured", ["prompt", "json_schema"])
def test_nonsense_is_a_counted_failure(structured: str) -> None:
    options = {
        "model": str(THINKER),
        "structured": structured,
        "frames": 2,
        "max_tokens": 48,
        "engine": {"max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20, "skip_mm_profiling": True},
    }
    worker = ModelWorker("judge-0", "judge", "actors.scoring.judge:Judge", options)
    worker.setup()
    first, again = worker.process(requests()), worker.process(requests())
    counted = worker.counters()
    assert counted["asks"] >= 3 and counted["tokens_in"] > 100 and counted["tokens_out"] > 0
    for outcome in first:
        if structured == "prompt":
            assert isinstance(outcome, Failure) and outcome.kind == "data" and "the judge's answer" in outcome.message
        elif isinstance(outcome, Ok):  # the grammar lets nothing else be said, where it comes to its end
            assert 0.0 <= outcome.value.values["judge"] <= 1.0
        else:
            assert "truncated" in outcome.message
    assert [type(outcome) for outcome in first] == [type(outcome) for outcome in again]
