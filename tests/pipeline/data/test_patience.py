"""A Ray Data execution without anything to do sleeps, longer each time; one that works does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.data import patience
from pipeline.data.patience import LONGEST_S, SHORTEST_S, Patience


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; time passes in them alone, unless a test says so."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, perf_counter=lambda: sum(pauses))
    monkeypatch.setattr(patience, "time", clock)
    return pauses


def executor(submitted: int, generated: int, taken: int) -> SimpleNamespace:
    metrics = SimpleNamespace(
        num_tasks_submitted=submitted, num_task_outputs_generated=generated, num_outputs_taken=taken
    )
    return SimpleNamespace(_topology=[SimpleNamespace(metrics=metrics)])


def test_idle_steps_pause_longer_each_time_up_to_a_limit(clock: list[float]) -> None:
    waiting = Patience()
    for _ in range(8):
        waiting.on_execution_step(executor(2, 2, 1))
    assert clock[:3] == [SHORTEST_S, 2 * SHORTEST_S, 4 * SHORTEST_S]
    assert max(clock) == clock[-1] == LONGEST_S


@pytest.mark.parametrize("then", [(3, 2, 1), (2, 3, 1), (2, 2, 2)], ids=["task", "block", "taken"])
def test_any_progress_ends_the_pauses(clock: list[float], then: tuple[int, int, int]) -> None:
    waiting = Patience()
    for step in ((2, 2, 1), (2, 2, 1), (2, 2, 1), then):
        waiting.on_execution_step(executor(*step))
    assert clock == [SHORTEST_S, 2 * SHORTEST_S]  # none for the first step, none for the last
    waiting.on_execution_step(executor(*then))
    assert clock[-1] == SHORTEST_S


def test_a_step_that_waited_for_a_task_needs_no_pause(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(patience.time, "perf_counter", lambda: now)
    waiting = Patience()
    for _ in range(4):
        waiting.on_execution_step(executor(2, 2, 1))
        now += 0.1  # how long Ray waits
    assert clock == []
