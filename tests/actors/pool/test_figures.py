"""A pool's figures: hand-calculated rates, ages and timings, with the time as a number."""

from __future__ import annotations

import pytest

from actors.failures import Failure, Ok
from actors.pool.commands import Send
from actors.pool.dispatch import Dispatcher
from actors.pool.spec import Meter, Timings
from tests.actors.pool.limits import limits


def serving() -> Dispatcher:
    core = Dispatcher("p", *limits(max_batch=1, max_wait_s=0.0, probe_every_s=1e6))
    core.resize(1)
    core.step(0.0)
    core.started("p-0", 0.0)
    core.step(0.0)
    core.loaded("p-0", 0, 0.0)
    core.step(0.0)
    return core


def test_rate_counts_the_answers_of_the_last_minute() -> None:
    meter = Meter()
    assert meter.requests_per_min(5.0) == 0.0
    meter.busy(1, 1, 10.0)  # the first figure
    for second in range(1, 21):
        meter.answered(10.0 + second)
    assert meter.requests_per_min(30.0) == 60.0  # 20 answers in 20 s
    assert meter.requests_per_min(70.0) == 20.0  # all within the last minute
    assert meter.requests_per_min(80.0) == 10.0  # the first ten are older
    assert meter.requests_per_min(1000.0) == 0.0 and meter.done == 20
    young = Meter()
    young.busy(1, 1, 0.0)
    young.answered(0.1)
    assert young.requests_per_min(0.1) == 60.0  # one answer in a tenth of a second is no 600 a minute


def test_oldest_wait_is_the_age_of_the_request_that_waits_longest() -> None:
    core = serving()
    assert core.stats(3.0).oldest_wait_s == 0.0
    for at in (10.0, 12.0, 14.0):
        core.submit(at)
    core.step(14.0)  # the first is sent, two wait
    assert core.stats(20.0).oldest_wait_s == 8.0
    core.answered(1, [Ok(1)], 21.0)
    core.step(21.0)
    assert core.stats(21.5).oldest_wait_s == 7.5
    core.answered(2, [Failure("infrastructure", "device lost")], 22.0)  # waits again from now, the other since 14
    assert core.stats(23.0).oldest_wait_s == 9.0


def test_timings_are_taken_once() -> None:
    core = serving()
    core.submit(1.0)
    core.submit(1.0)
    core.step(2.0)
    core.answered(1, [Ok(1)], 5.0)
    assert [command for command in core.step(5.0) if isinstance(command, Send)]
    assert core.meter.take_timings() == Timings(waits=(1.0, 4.0), calls=(3.0,))
    assert core.meter.take_timings() == Timings()
    for _ in range(Meter.MOST_TIMINGS + 5):
        core.meter.waited(1.0)
    assert len(core.meter.take_timings().waits) == Meter.MOST_TIMINGS  # nobody has to take them


def test_a_worker_is_placed_once_the_cluster_had_room() -> None:
    core = Dispatcher("p", *limits())
    core.resize(2)
    core.step(0.0)
    core.placed("p-1")
    assert [worker.placed for worker in core.stats(1.0).workers] == [False, True]


@pytest.mark.parametrize("name", ["oldest_wait_s", "requests_per_min"])
def test_new_figures_are_logged(name: str) -> None:
    assert name in serving().stats(1.0).metrics()
