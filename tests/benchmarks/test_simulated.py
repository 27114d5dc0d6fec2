"""The simulated benchmarks at their smallest: what they measure is what a run does, and every run of them is the same."""

from __future__ import annotations

import asyncio

import pytest

from tests.benchmarks import scheduling, streaming
from tests.benchmarks.simulated import Recorded, VirtualLoop, simulate

pytestmark = pytest.mark.slow


def test_the_clock_jumps_over_sleep_and_keeps_the_order_of_events() -> None:
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, asyncio.get_running_loop().time()))

    async def story() -> None:
        assert isinstance(asyncio.get_running_loop(), VirtualLoop)
        await asyncio.gather(sleeper("late", 3600.0), sleeper("early", 0.5))

    simulate(story)
    assert [name for name, _ in seen] == ["early", "late"]
    assert [time for _, time in seen] == pytest.approx([0.5, 3600.0], abs=1e-5)


def test_a_simulation_that_can_never_end_says_so() -> None:
    async def story() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="never come"):
        simulate(story)


def test_service_times_are_the_recorded_ones() -> None:
    recorded = Recorded.load()
    draw, again = recorded.service(3), recorded.service(3)
    for pool, by in recorded.calls.items():
        assert by, pool
        for requests in sorted(by)[:3]:
            seconds = draw(pool, requests)
            assert seconds in by[requests] and seconds == again(pool, requests)
    assert min(recorded.update_s) > 0 and min(recorded.publish_s) > 0


def test_barriers_change_when_things_happen_and_nothing_else() -> None:
    apart, together = (streaming.step((2, 3, 1), 6, 0, barriers=barriers) for barriers in (True, False))
    assert sorted(apart.scores) == sorted(together.scores) and len(apart.scores) == 6 * 8
    assert apart.makespan_s > together.makespan_s >= together.bound_s - 1e-6
    assert streaming.step((2, 3, 1), 6, 0, barriers=False) == together


def test_curves_are_as_far_apart_as_their_seeds_means() -> None:
    strict = [[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 4.0, 4.0]]  # means 0.5 and 3, spreads 1 and 2
    ahead = [[1.0, 1.0, 3.0, 3.0], [1.0, 1.0, 4.0, 4.0]]  # means 1 and 3.5
    found = streaming.distance({0: strict, 1: ahead}, parts=2)
    assert found["apart"] == 0.5 and found["spread"] == 1.5
    assert (found["first"], found["last, max_staleness 0"], found["last, max_staleness 1"]) == (0.5, 3.0, 3.5)
    assert streaming.distance({0: strict, 1: strict})["apart"] == 0


@pytest.mark.parametrize("measure", [streaming.measure, streaming.measure_staleness, scheduling.measure])
def test_the_rows_run(measure: object) -> None:
    result = measure("smoke")  # type: ignore[operator]
    assert result.checks and result.figures and result.notes
