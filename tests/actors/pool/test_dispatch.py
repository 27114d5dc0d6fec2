"""The dispatcher without Ray or a clock: batching, weights, sizes, rest."""

from __future__ import annotations

import pytest

from actors.failures import Ok
from actors.pool.commands import Deliver, End, Load, Probe, Send, Start
from actors.pool.state import S
from tests.actors.pool.dispatching import make, obey, only, serving, states, submit

# --- batches


def test_workers_start_together_and_load_before_they_serve() -> None:
    core = make(3)
    core.publish(9)
    submit(core, 4)
    assert core.step(0.0) == [Start("p-0"), Start("p-1"), Start("p-2")]
    core.started("p-1", 5.0)
    assert core.step(5.0) == [Load("p-1", 9)]  # requests wait, although this one lives
    core.loaded("p-1", 9, 6.0)
    assert core.step(6.0) == [Send(1, "p-1", (0, 1, 2, 3))]


def test_full_batch_goes_at_once_a_partial_one_when_it_is_old() -> None:
    core = serving(1)
    submit(core, 3, now=10.0)
    assert core.step(10.0) == [] and core.wake_at(10.0) == 11.0
    assert core.step(10.9) == []
    assert core.step(11.0) == [Send(1, "p-0", (0, 1, 2))]
    core.answered(1, [Ok(n) for n in range(3)], 12.0)
    assert core.step(12.0) == [Deliver(0, 0), Deliver(1, 1), Deliver(2, 2)]
    submit(core, 5, now=20.0)
    assert only(core.step(20.0), Send) == [Send(2, "p-0", (3, 4, 5, 6))]
    stats = core.stats(20.0)
    assert stats.queue_len == 1 and stats.inflight == 4 and stats.service_s == 1.0 and stats.batch_mean == 3.0
    assert stats.queue_wait_total_s == 3.0  # three requests of a second each, four of none


def test_load_is_spread_over_free_workers_and_bounded_by_inflight() -> None:
    core = serving(2, max_batch=8)
    submit(core, 8)
    assert [send.tickets for send in core.step(0.0)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    submit(core, 16)
    assert core.step(0.5) == []  # both are busy
    core = serving(2, max_batch=1, max_inflight=2)
    submit(core, 5)
    assert [send.name for send in core.step(0.0)] == ["p-0", "p-1", "p-0", "p-1"]
    assert core.stats(0.0).queue_len == 1


def test_forgotten_requests_are_not_sent_nor_sent_again() -> None:
    core = serving(1, max_batch=2)
    submit(core, 3)
    core.forget(1)
    assert core.step(0.0) == [Send(1, "p-0", (0, 2))]
    core.forget(2)
    core.died("p-0", "killed", 1.0)
    sends = only(obey(core, 3.0), Send)
    assert [send.tickets for send in sends] == [(0,)]


# --- weights


def test_new_weights_wait_for_calls_under_way_and_bind_what_comes_later() -> None:
    core = serving(2, max_batch=1)
    submit(core, 1)
    core.step(0.0)
    core.publish(1)
    submit(core, 1)
    assert core.step(1.0) == [Load("p-1", 1)]  # p-0 still answers with version 0
    core.answered(1, [Ok("old")], 2.0)
    assert core.step(2.0) == [Deliver(0, "old"), Load("p-0", 1)]
    core.publish(2)  # overtaken while they load
    core.loaded("p-0", 1, 3.0)
    core.loaded("p-1", 1, 3.0)
    assert core.step(3.0) == [Load("p-0", 2), Load("p-1", 2)]
    core.loaded("p-1", 2, 4.0)
    assert core.step(4.0) == [Send(2, "p-1", (1,))]


def test_replacement_is_stale_until_it_has_loaded_the_current_version() -> None:
    core = serving(1)
    core.publish(5)
    obey(core, 1.0)
    submit(core, 4, now=1.0)
    core.step(1.0)
    core.died("p-0", "killed", 2.0)
    assert core.step(2.0) == [End("p-0", healthy=False), Start("p-0.2")]
    assert states(core) == {"p-0.2": S.RESTARTING}
    core.loaded("p-0", 5, 2.5)  # a late report of the dead one changes nothing
    core.answered(1, [Ok(0)] * 4, 2.5)
    core.started("p-0.2", 3.0)
    assert core.step(3.0) == [Load("p-0.2", 5)]
    core.loaded("p-0.2", 5, 4.0)
    assert core.step(4.0) == [Send(2, "p-0.2", (0, 1, 2, 3))]
    assert core.stats(4.0).retries == 4 and core.stats(4.0).restarts == 1


# --- resizing


def test_grow_starts_without_touching_the_rest_and_shrink_drains() -> None:
    core = serving(1, max_batch=1)
    submit(core, 2)
    core.step(0.0)
    core.resize(3)
    assert core.step(1.0) == [Start("p-1"), Start("p-2")]
    core.started("p-1", 2.0)
    core.step(2.0)
    core.loaded("p-1", 0, 2.0)
    assert core.step(2.0) == [Send(2, "p-1", (1,))]
    core.resize(1)  # the one that still starts goes at once, the busy one when it is done
    assert core.step(3.0) == [End("p-2", healthy=False)]
    assert states(core) == {"p-0": S.READY, "p-1": S.RETIRED}
    core.answered(2, [Ok(1)], 4.0)
    assert core.step(4.0) == [Deliver(1, 1), End("p-1", healthy=True)]
    core.resize(2)
    assert core.step(5.0) == [Start("p-1.2")]  # the same slot, a new name


def test_retired_worker_that_dies_is_not_replaced_but_its_requests_are_sent_again() -> None:
    core = serving(2, max_batch=1)
    submit(core, 2)
    core.step(0.0)
    core.resize(1)
    core.died("p-1", "killed", 1.0)
    core.answered(1, [Ok(0)], 1.0)
    assert only(core.step(2.0), Send) == [Send(3, "p-0", (1,))]
    assert core.stats(2.0).restarts == 0


def test_a_worker_that_is_named_leaves_before_those_that_do_not_serve_and_higher_slots() -> None:
    core = serving(3)
    core.resize(4)  # p-3 has not begun to serve
    core.resize(3, "p-0")
    assert {name for name, state in states(core).items() if state is S.RETIRED} == {"p-0"}
    core.resize(2, "gone already")
    assert {name for name, state in states(core).items() if state is S.RETIRED} == {"p-0", "p-3"}


def test_resize_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make(2).resize(0)


def test_busy_ratio_follows_the_load() -> None:
    core = serving(2, max_batch=1)
    submit(core, 1)
    core.step(0.0)
    assert core.stats(300.0).busy_ratio == pytest.approx(0.5, abs=1e-3)
    core.answered(1, [Ok(0)], 300.0)
    core.step(300.0)
    assert core.stats(600.0).busy_ratio == pytest.approx(0.0, abs=1e-3)


# --- rest


def test_a_resting_pool_asks_nothing_of_its_workers_but_pings() -> None:
    core = serving(2, probe_every_s=5.0)
    core.resting = True
    tickets = submit(core, 3)
    core.publish(1)
    core.died("p-0", "killed", 1.0)
    core.resize(3)
    assert only(core.step(2.0), Send) == [] and states(core) == {
        "p-0.2": S.RESTARTING,
        "p-1": S.STALE,
        "p-2": S.STARTING,
    }
    assert core.wake_at(2.0) == 5.0  # nothing to wait for but the next ping
    assert core.step(1000.0) == [Probe("p-1")]
    core.probed("p-1", 1000.5)
    core.resting = False
    assert core.step(1001.0) == [Start("p-0.2"), Load("p-1", 1), Start("p-2")]
    sent = only(obey(core, 1002.0), Send)
    core.loaded("p-1", 1, 1003.0)
    sent += only(obey(core, 1003.0), Send)
    assert sorted(t for send in sent for t in send.tickets) == tickets


def test_a_ready_worker_of_a_resting_pool_is_still_probed() -> None:
    core = serving(1, probe_every_s=5.0)
    core.resting = True
    assert core.step(6.0) == [Probe("p-0")]
    core.suspected("p-0", "no answer", 7.0)
    assert core.step(8.0) == [Probe("p-0")]


def test_a_stale_worker_of_a_resting_pool_is_probed_and_loads_later() -> None:
    core = serving(1, probe_every_s=5.0)
    core.resting = True
    core.publish(3)
    assert core.step(1.0) == [] and core.wake_at(1.0) == 5.0
    assert core.step(6.0) == [Probe("p-0")]
    core.died("p-0", "no answer", 7.0)
    assert only(core.step(8.0), Start) == []
    core.resting = False
    assert only(core.step(9.0), Start) == [Start("p-0.2")]
