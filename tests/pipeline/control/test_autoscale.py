"""The autoscaler on a pool's trace (``trace.json``, which says where it is from), and in charge of the real dispatcher."""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from actors.failures import Ok
from actors.pool.commands import End, Load, Send, Start
from actors.pool.dispatch import Dispatcher
from actors.pool.settings import AutoscaleSection, PoolSection
from pipeline.control.autoscale import Autoscaler, PoolPoint, decide, last_change
from tests.actors.pool.limits import limits

SETTINGS = AutoscaleSection(enabled=True, min=1, max=4, target_wait_s=1.0, window_s=4.0, cooldown_s=3.0)


def recorded() -> list[PoolPoint]:
    found = json.loads(Path(__file__).with_name("trace.json").read_text())
    return [PoolPoint(**dict(zip(found["fields"], row, strict=True))) for row in found["points"]]


TRACE = recorded()


def wishes(settings: AutoscaleSection, trace: Sequence[PoolPoint] = TRACE) -> list[tuple[PoolPoint, int]]:
    """Return what the autoscaler would have wanted at each point, from what had been seen until then."""
    return [(point, decide(settings, trace[: i + 1], point.at)) for i, point in enumerate(trace)]


def first(condition: object) -> float:
    return next(point.at for point in TRACE if condition(point))  # type: ignore[operator]


def test_recording_holds_what_the_tests_are_about() -> None:
    assert len(TRACE) > 80 and {point.target for point in TRACE} == {1, 2, 4}
    assert max(point.oldest_wait_s for point in TRACE) > 3 and max(point.queue_len for point in TRACE) > 20
    assert any(point.target == 4 and point.ready == 3 and point.coming == 1 and point.queue_len for point in TRACE)
    assert TRACE[-1].target == 1 and TRACE[-1].queue_len == 0 and TRACE[-1].inflight == 0


def test_quiet_pool_keeps_its_size_and_a_burst_makes_it_grow_at_the_moment_a_wait_is_too_long() -> None:
    calm_until = TRACE[0].at + SETTINGS.cooldown_s
    late = first(lambda p: p.at >= calm_until and p.ready == p.target and p.oldest_wait_s > SETTINGS.target_wait_s)
    grown = next(point.at for point, wish in wishes(SETTINGS) if wish > point.target)
    assert grown == late
    patient = SETTINGS.model_copy(update={"target_wait_s": 1000.0, "max": 1})
    assert all(wish == point.target for point, wish in wishes(patient) if point.target == 1)


def test_nothing_changes_within_the_cool_down_of_a_change_by_hand() -> None:
    eager = SETTINGS.model_copy(update={"target_wait_s": 0.05})
    for (old, _), (new, _) in pairwise(wishes(eager)):
        if new.target != old.target:
            calm = [(p, wish) for p, wish in wishes(eager) if new.at <= p.at < new.at + eager.cooldown_s]
            assert calm and all(wish == p.target for p, wish in calm)
    assert any(wish > point.target for point, wish in wishes(eager))


def test_a_worker_that_waits_for_room_stops_growth_however_long_the_queue() -> None:
    eager = SETTINGS.model_copy(update={"max": 8, "cooldown_s": 0.0})
    waiting = [(p, wish) for p, wish in wishes(eager) if p.coming and p.oldest_wait_s > eager.target_wait_s]
    assert len(waiting) > 5 and all(wish <= p.target for p, wish in waiting)
    # The same queue with the worker in place would make it grow.
    served = [dataclasses.replace(p, ready=p.target, coming=0) for p in TRACE]
    assert any(wish > p.target for p, wish in wishes(eager, served) if p.target == 4)


def test_idle_pool_shrinks_step_by_step_after_a_window_of_calm() -> None:
    idle = [dataclasses.replace(TRACE[-1], at=float(n), target=4, ready=4, busy=0, busy_ratio=0.0) for n in range(20)]
    found = [(p.at, wish) for p, wish in wishes(SETTINGS, idle) if wish != 4]
    assert found[0] == (idle[0].at + SETTINGS.window_s, 3)  # the first point counts as the last change
    two = SETTINGS.model_copy(update={"step": 2})
    assert decide(two, idle, idle[-1].at) == 2
    floor = SETTINGS.model_copy(update={"min": 4})
    assert all(wish == 4 for _, wish in wishes(floor, idle))


def test_a_recorded_burst_shrinks_nothing_and_its_end_does() -> None:
    busy_end = first(lambda p: p.target == 4 and p.ready == 3 and p.queue_len == 0 and p.at > 40)
    found = [(p, wish) for p, wish in wishes(SETTINGS) if wish < p.target]
    assert found and all(p.at >= busy_end for p, _ in found)


def test_one_call_behind_another_counts_where_all_workers_were_busy() -> None:
    still = PoolPoint(0.0, 2, 2, 0, 2, 0, 0.0, 2, 10, service_s=0.8, busy_ratio=0.3)
    slow = [dataclasses.replace(still, at=float(n)) for n in range(10)]
    assert (
        decide(SETTINGS, slow, 9.0) == 2
    )  # with one worker a request would wait for a call of 0.8 s: over half of 1 s
    quick = [dataclasses.replace(point, service_s=0.1) for point in slow]
    assert decide(SETTINGS, quick, 9.0) == 1
    loaded = [dataclasses.replace(point, busy_ratio=0.6) for point in quick]
    assert decide(SETTINGS, loaded, 9.0) == 2  # one worker would be busy for 120 % of the time


def test_a_size_by_hand_outside_the_limits_is_left_alone() -> None:
    idle = [dataclasses.replace(TRACE[-1], at=float(n), target=9, ready=9, busy_ratio=0.0) for n in range(40)]
    assert decide(SETTINGS, idle, 39.0) == 9
    back = [*idle, *(dataclasses.replace(p, at=p.at + 40.0, target=4, ready=4) for p in idle)]
    assert last_change(back) == 40.0
    assert decide(SETTINGS, back[:42], 41.0) == 4 and decide(SETTINGS, back, 79.0) == 3
    assert decide(SETTINGS.model_copy(update={"enabled": False}), back, 79.0) == 4


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="min=3 is above max=2"):
        AutoscaleSection(min=3, max=2)
    with pytest.raises(
        ValidationError, match=r"workers=9 with autoscale: start with autoscale.min=1 to autoscale.max=4"
    ):
        PoolSection(workers=9, autoscale=SETTINGS)
    assert not PoolSection(workers=9).autoscale.enabled


# --- in charge: the pool's own dispatcher, a clock that is a number, calls that take the recorded time

TICK = 0.05


def rule(settings: AutoscaleSection, arrivals: dict[float, int], until: float, call_s: float) -> list[PoolPoint]:
    """Let the autoscaler size a dispatcher's pool from one worker; return what it saw, twice a second."""
    core = Dispatcher("toy", *limits(max_batch=1, max_wait_s=0.0, probe_every_s=1e9))
    core.resize(1)
    answers: list[tuple[float, int, int]] = []
    starts: list[tuple[float, str]] = []
    seen: list[PoolPoint] = []
    autoscaler = Autoscaler(settings)
    due = sorted(arrivals.items())
    for tick in range(int(until / TICK)):
        now = tick * TICK
        while due and due[0][0] <= now:
            for _ in range(due.pop(0)[1]):
                core.submit(now)
        while answers and answers[0][0] <= now:
            _, call, count = heapq.heappop(answers)
            core.answered(call, [Ok(0)] * count, now)
        while starts and starts[0][0] <= now:
            core.started(heapq.heappop(starts)[1], now)
        again = True
        while again:
            again = False
            for command in core.step(now):
                match command:
                    case Start(name):
                        core.placed(name)
                        heapq.heappush(starts, (now + 2.0, name))
                    case Load(name, version):
                        core.loaded(name, version, now)
                        again = True
                    case Send(call, _, tickets):
                        heapq.heappush(answers, (now + call_s, call, len(tickets)))
                    case End():
                        pass
        if tick % 10 == 0:
            seen.append(PoolPoint.of(core.stats(now), now))
            wanted = autoscaler.see(seen[-1])
            if wanted != core.target:
                core.resize(wanted)
    return seen


def changes(seen: Sequence[PoolPoint]) -> list[tuple[float, int]]:
    return [(new.at, new.target - old.target) for old, new in pairwise(seen) if new.target != old.target]


def arrivals_of(trace: Sequence[PoolPoint]) -> dict[float, int]:
    """Return the recorded arrivals: requests that were done, inside workers or in the queue for the first time."""
    total = [point.done + point.inflight + point.queue_len for point in trace]
    return {new.at: more - less for (less, more), new in zip(pairwise(total), trace[1:]) if more > less}


def test_forgetting_what_is_old_changes_no_decision() -> None:
    autoscaler = Autoscaler(SETTINGS)
    assert [autoscaler.see(point) for point in TRACE] == [wish for _, wish in wishes(SETTINGS)]
    assert len(autoscaler.trace) < 15 < len(TRACE)


def test_in_charge_of_the_recorded_load_it_grows_for_the_burst_and_ends_at_the_minimum() -> None:
    call_s = max(point.service_s for point in TRACE)
    seen = rule(SETTINGS, arrivals_of(TRACE), 140.0, call_s)
    sizes = [point.target for point in seen]
    turns = sum((a > 0) != (b > 0) for (_, a), (_, b) in pairwise(changes(seen)))
    assert max(sizes) >= 3 and SETTINGS.max >= max(sizes) and min(sizes) >= SETTINGS.min
    assert sizes[-1] == SETTINGS.min and turns == 1  # up, then down, and never up again
    assert seen[-1].queue_len == 0
    alone = rule(SETTINGS.model_copy(update={"max": 1}), arrivals_of(TRACE), 140.0, call_s)
    assert max(p.oldest_wait_s for p in seen) < 0.7 * max(p.oldest_wait_s for p in alone)


def test_steady_load_settles_and_changes_no_more() -> None:
    arrivals = {n * 0.1: 3 for n in range(3000)}  # 30 requests a second of 0.08 s each: 2.4 workers' work
    seen = rule(SETTINGS, arrivals, 300.0, 0.08)
    moves = changes(seen)
    assert seen[-1].target in (3, 4)
    assert [move for at, move in moves if at > 60.0] == []


def test_rollouts_in_bursts_keep_the_workers_that_a_burst_needs() -> None:
    """A step asks for everything at once and then learns: a window of more than a step sees through the pauses."""
    settings = SETTINGS.model_copy(update={"window_s": 25.0, "cooldown_s": 10.0})
    arrivals = {20.0 * step: 40 for step in range(20)}
    seen = rule(settings, arrivals, 400.0, 0.1)
    moves = changes(seen)
    assert all(b - a >= settings.cooldown_s for (a, _), (b, _) in pairwise(moves))
    assert [move for at, move in moves if at > 150.0] == [] and seen[-1].target > 1
