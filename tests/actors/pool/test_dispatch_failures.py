"""The dispatcher without Ray or a clock: what fails, what is tried again, and when a pool gives up."""

from __future__ import annotations

import pytest

from actors.failures import Failure, Ok, Outcome
from actors.pool.commands import Command, Deliver, End, Load, Probe, Reject, Send, Start
from actors.pool.dispatch import Dispatcher
from actors.pool.errors import PoolFailed, SampleFailed, WorkerBug
from actors.pool.state import S
from tests.actors.pool.dispatching import BROKEN, make, obey, only, serving, states, submit


def test_failure_classes() -> None:
    core = serving(2, max_batch=3)
    submit(core, 6)
    core.step(0.0)
    outcomes: list[Outcome] = [Failure("data", "no frames"), Failure("bug", "KeyError: x", "Traceback …"), BROKEN]
    core.answered(1, outcomes, 1.0)
    core.answered(2, [Ok(0)] * 3, 1.0)
    out = core.step(1.0)
    errors = {reject.ticket: reject.error for reject in only(out, Reject)}
    assert isinstance(errors[0], SampleFailed) and "no frames" in str(errors[0])
    assert isinstance(errors[1], WorkerBug) and errors[1].worker_traceback == "Traceback …"
    assert Probe("p-0") in out  # the third was its machine's fault
    assert only(core.step(2.0), Send) == [Send(3, "p-1", (2,))]  # and is sent to the other
    assert core.stats(2.0).failures == {"data": 1, "bug": 1, "infrastructure": 1}


def test_an_error_for_people_reaches_the_submitter_without_a_traceback() -> None:
    core = serving(1)
    submit(core, 4)
    core.step(0.0)
    missing = Failure("bug", "the weights are missing", "Traceback …", for_people=True)
    core.answered(1, [missing, *[Ok(0)] * 3], 1.0)
    (reject,) = only(core.step(1.0), Reject)
    assert isinstance(reject.error, PoolFailed) and str(reject.error) == "p-0: the weights are missing"


def test_suspect_worker_is_probed_and_comes_back_through_stale() -> None:
    core = serving(1)
    submit(core, 4)
    core.step(0.0)
    core.suspected("p-0", "connection lost", 1.0, call=1)
    assert states(core) == {"p-0": S.SUSPECT}
    assert core.step(1.0) == [Probe("p-0")]
    core.probed("p-0", 2.0)
    assert core.step(2.0) == [Load("p-0", 0)]
    core.loaded("p-0", 0, 3.0)
    assert only(core.step(3.0), Send) == [Send(2, "p-0", (0, 1, 2, 3))]  # the only worker gets them again
    core.suspected("p-0", "connection lost", 4.0, call=2)
    core.step(4.0)
    core.suspected("p-0", "no answer", 5.0)  # the probe fails as well: the third strike
    assert core.step(5.0) == [End("p-0", healthy=False), Start("p-0.2")]


def test_publishing_the_version_that_is_served_changes_nothing() -> None:
    core = serving(2)
    core.publish(3)
    obey(core, 1.0)
    core.publish(3)
    assert set(states(core).values()) == {S.READY} and core.step(2.0) == []
    submit(core, 4, now=2.0)
    assert [type(command) for command in core.step(2.0)] == [Send, Send]  # no worker loads what it holds


def fail(core: Dispatcher, now: float, outcome: Outcome = BROKEN) -> list[Command]:
    """Have one request answered with ``outcome``, and whatever is asked of the worker done; returns the rest."""
    core.submit(now)
    (send,) = only(obey(core, now), Send)
    core.answered(send.call, [outcome], now)
    return obey(core, now)


def test_a_good_answer_forgives_strikes() -> None:
    core = serving(1, max_strikes=3, max_retries=0, max_wait_s=0.0)
    for now, outcome in enumerate(
        [BROKEN, BROKEN, Ok(1), BROKEN, BROKEN, Failure("data", "no frames"), BROKEN, BROKEN]
    ):
        fail(core, float(now), outcome)
    assert states(core) == {"p-0": S.READY}  # six failures of its machine, never three in a row
    assert any(isinstance(command, End) for command in fail(core, 9.0))
    assert set(states(core)) == {"p-0.2"}


def test_a_new_process_has_the_strikes_of_its_own() -> None:
    core = serving(1, max_strikes=3, max_retries=0, max_wait_s=0.0, backoff_s=0.0)
    for now in range(5):
        fail(core, float(now))
    assert set(states(core)) == {"p-0.2"}  # after three; the new one has two
    fail(core, 5.0)
    assert set(states(core)) == {"p-0.3"}


def test_what_failed_on_a_worker_waits_for_another_one() -> None:
    """The worker that failed is free again, and the other one is busy: the request waits for the other."""
    core = serving(2, max_batch=1)
    submit(core, 2)
    assert core.step(0.0) == [Send(1, "p-0", (0,)), Send(2, "p-1", (1,))]
    core.answered(1, [BROKEN], 1.0)
    assert obey(core, 1.0) == [] and states(core)["p-0"] is S.READY
    core.answered(2, [Ok("b")], 2.0)
    assert obey(core, 2.0) == [Deliver(1, "b"), Send(3, "p-1", (0,))]
    core.answered(3, [BROKEN], 3.0)
    assert obey(core, 3.0) == [Send(4, "p-0", (0,))]  # now p-1 is the one to avoid


def test_what_failed_goes_back_where_there_is_no_other() -> None:
    core = serving(1, max_batch=1)
    submit(core, 1)
    core.step(0.0)
    core.answered(1, [BROKEN], 1.0)
    assert obey(core, 1.0) == [Send(2, "p-0", (0,))]


def test_a_slot_that_has_served_starts_again_at_once() -> None:
    """Backing off is for processes that never become ready; one that has served for a while is not among them."""
    core = serving(1, backoff_s=10.0, max_backoff_s=100.0)
    for now in (1.0, 2.0, 3.0):
        (worker,) = core.workers
        core.died(worker.name, "killed", now)
        assert only(core.step(now), Start)  # at once, each time
        (worker,) = core.workers
        core.started(worker.name, now)
        obey(core, now)
        assert worker.state is S.READY and worker.failed_starts == 0


def test_calls_beside_requests_end_with_the_process() -> None:
    """A worker that dies under ``call_all`` is probed again once it is back: the old call is not waited for."""
    core = serving(1, probe_every_s=5.0)
    core.hold("p-0", 1)
    assert core.step(50.0) == []  # a probe would wait behind the call
    core.died("p-0", "killed", 50.0)
    obey(core, 50.0)
    assert core.step(60.0) == [Probe("p-0.2")]


def test_wrong_number_of_answers_is_a_bug() -> None:
    core = serving(1, max_batch=2)
    submit(core, 2)
    core.step(0.0)
    core.answered(1, [Ok(1)], 1.0)
    rejected = only(core.step(1.0), Reject)
    assert len(rejected) == 2 and all("1 of 2" in str(reject.error) for reject in rejected)
    submit(core, 2, now=2.0)
    core.step(2.0)
    core.answered(2, [Ok(1)] * 3, 3.0)
    assert all("3 of 2" in str(reject.error) for reject in only(core.step(3.0), Reject))


def test_deadly_request_fails_alone() -> None:
    core = serving(1, max_batch=4, max_retries=3)
    submit(core, 4)
    poison, delivered, failed, now = 2, [], [], 0.0
    for _ in range(40):
        now += 2.0
        for command in obey(core, now):
            match command:
                case Send(call, name, tickets):
                    if poison in tickets:
                        core.died(name, "SIGSEGV", now)
                    else:
                        core.answered(call, [Ok(ticket) for ticket in tickets], now)
                case Deliver(ticket, _):
                    delivered.append(ticket)
                case Reject(ticket, error):
                    failed.append((ticket, error))
    assert sorted(delivered) == [0, 1, 3]
    ((ticket, error),) = failed
    assert ticket == poison and isinstance(error, PoolFailed)
    assert "failed 4 times" in str(error) and str(error).count("SIGSEGV") == 4


def test_restarts_back_off_and_end_in_an_error_with_reasons() -> None:
    core = make(1, max_restarts=3, backoff_s=1.0, max_backoff_s=1.5)
    submit(core, 1)
    starts, now = [], 0.0
    for _ in range(100):
        for command in core.step(now):
            if isinstance(command, Start):
                starts.append(now)
                core.died(command.name, f"no CUDA device on {command.name}", now)
            if isinstance(command, Reject):
                text = str(command.error)
        now += 0.25
    assert starts == [0.0, 0.25, 1.25, 2.75]
    assert "workers died 4 times" in text
    assert all(f"{name}: no CUDA device" in text for name in ("p-0", "p-0.2", "p-0.3", "p-0.4"))
    with pytest.raises(PoolFailed, match="max_restarts=3"):
        core.submit(now)


def test_deaths_of_an_hour_ago_no_longer_count() -> None:
    core = make(1, max_restarts=2)
    for hour in range(9):
        for death in (0.0, 60.0):
            now = 3600.0 * hour + death
            (start,) = only(core.step(now + 30.0), Start)
            core.died(start.name, "node lost", now + 30.0)
    assert core.failure is None and core.meter.restarts == 18
    (start,) = only(core.step(now + 60.0), Start)
    core.died(start.name, "node lost", now + 60.0)
    assert "workers died 3 times within 60 min" in str(core.failure)


def test_idle_workers_are_probed_busy_ones_are_not() -> None:
    core = serving(2, probe_every_s=10.0, max_batch=1)
    submit(core, 1)
    core.step(1.0)
    assert core.wake_at(1.0) == 10.0
    assert core.step(10.0) == [Probe("p-1")]
    submit(core, 1, now=10.0)
    assert core.step(10.0) == []  # nothing is sent to a worker whose pulse is being taken
    core.died("p-1", "no answer to ping", 40.0)
    assert End("p-1", healthy=False) in core.step(40.0)


def test_a_worker_is_probed_so_long_after_it_was_last_heard_of() -> None:
    """Whatever it was heard of by: its start, its weights, an answer, a ping."""
    core = make(1, probe_every_s=5.0, max_wait_s=0.0)
    core.step(0.0)
    core.started("p-0", 10.0)
    assert core.step(10.0) == [Load("p-0", 0)]
    core.loaded("p-0", 0, 20.0)
    assert core.step(20.0) == [] and core.wake_at(20.0) == 25.0
    submit(core, 1, now=24.0)
    core.step(24.0)
    core.answered(1, [Ok(1)], 30.0)
    core.step(30.0)
    assert core.step(34.9) == [] and core.wake_at(34.9) == 35.0
    assert core.step(35.0) == [Probe("p-0")]
    core.probed("p-0", 36.0)
    assert core.step(36.0) == [] and core.wake_at(36.0) == 41.0
    resting = make(1, probe_every_s=5.0)
    resting.step(0.0)
    resting.resting = True
    resting.started("p-0", 10.0)
    assert resting.step(10.0) == [] and resting.wake_at(10.0) == 15.0  # its weights wait, and so do we


def test_reports_that_come_late_change_no_state() -> None:
    """A start that is reported twice, and weights that were loaded by a worker which is suspected meanwhile."""
    core = serving(1)
    core.started("p-0", 1.0)
    core.loaded("p-0", 0, 1.0)
    assert states(core) == {"p-0": S.READY} and core.step(1.0) == []
    core.publish(1)
    assert core.step(2.0) == [Load("p-0", 1)]
    core.struck("p-0", "connection lost", 3.0)
    core.loaded("p-0", 1, 4.0)
    assert states(core) == {"p-0": S.SUSPECT} and core.step(4.0) == [Probe("p-0")]
    core.probed("p-0", 5.0)
    core.probed("p-0", 5.0)
    assert states(core) == {"p-0": S.STALE} and core.step(5.0) == [Load("p-0", 1)]


def test_calls_beside_requests_are_never_fewer_than_none() -> None:
    core = serving(1, probe_every_s=5.0)
    core.hold("p-0", -1)
    core.hold("p-0", 1)
    core.hold("p-0", -1)
    assert core.step(50.0) == [Probe("p-0")]


def test_no_two_processes_of_a_slot_have_one_name() -> None:
    """A slot that was restarted, retired and filled again: reports about the old processes find nobody."""
    core = serving(2)
    core.died("p-1", "killed", 1.0)
    obey(core, 1.0)
    core.resize(1)
    assert only(core.step(2.0), End) == [End("p-1.2", healthy=True)]
    core.resize(2)
    assert set(states(core)) == {"p-0", "p-1.3"}


def test_a_worker_counts_its_good_answers() -> None:
    core = serving(1, max_batch=3)
    submit(core, 3)
    core.step(0.0)
    core.answered(1, [Ok(1), Failure("data", "no frames"), Ok(2)], 1.0)
    assert [worker.requests_done for worker in core.stats(1.0).workers] == [2] and core.stats(1.0).done == 2


def test_pool_waits_for_room_while_it_can_work_and_fails_when_it_cannot() -> None:
    core = make(2)
    core.step(0.0)
    core.placed("p-0")
    core.unplaced("p-1", "")
    assert core.failure is None
    core = make(2)
    core.step(0.0)
    core.unplaced("p-1", "Free: CPU 0.")
    assert isinstance(core.failure, PoolFailed) and "Free: CPU 0." in str(core.failure)
