"""The dispatcher without Ray or a clock: batching, weights, failures, limits, and random histories that must keep its promises."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.failures import Failure, Ok, Outcome
from actors.pool.commands import Command, Deliver, End, Load, Probe, Reject, Send, Start
from actors.pool.dispatch import Dispatcher
from actors.pool.errors import PoolFailed, SampleFailed, WorkerBug
from actors.pool.settings import PoolSection, Watch
from actors.pool.state import S
from tests.actors.pool.limits import limits


def make(workers: int = 2, **changes: object) -> Dispatcher:
    """A dispatcher that has been told its size."""
    core = Dispatcher(
        "p", *limits(workers=workers, **({"max_batch": 4, "max_wait_s": 1.0, "probe_every_s": 1e6} | changes))
    )
    core.resize(workers)
    return core


def serving(workers: int = 2, **limits: object) -> Dispatcher:
    """A dispatcher whose workers are all READY at version 0, at time 0."""
    core = make(workers, **limits)
    obey(core, 0.0)
    assert core.stats(0.0).ready == workers
    return core


def obey(core: Dispatcher, now: float) -> list[Command]:
    """Carry out starts, loads and probes at once until none is left; return the other commands."""
    rest: list[Command] = []
    while commands := core.step(now):
        for command in commands:
            match command:
                case Start(name):
                    core.started(name, now)
                case Load(name, version):
                    core.loaded(name, version, now)
                case Probe(name):
                    core.probed(name, now)
                case _:
                    rest.append(command)
    return rest


def submit(core: Dispatcher, count: int, now: float = 0.0) -> list[int]:
    return [core.submit(now) for _ in range(count)]


def only(commands: list[Command], kind: type) -> list:
    return [command for command in commands if isinstance(command, kind)]


def states(core: Dispatcher) -> dict[str, S]:
    return {worker.name: worker.state for worker in core.workers}


BROKEN = Failure("infrastructure", "device lost")


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


# --- failures


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


# --- random histories


class World:
    """Plays driver and workers with random delays and faults, and holds the dispatcher to its promises."""

    def __init__(self, seed: int, settings: PoolSection, hostile: bool) -> None:
        self.random, self.settings, self.hostile = random.Random(seed), settings, hostile
        self.core = Dispatcher("p", settings, Watch())
        self.core.resize(settings.workers)
        self.now, self.version = 0.0, 0
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.ended: dict[int, Command] = {}
        self.submitted_at: dict[int, int] = {}  # ticket → version current at its submission
        self.open_calls: dict[str, dict[int, int]] = {}  # worker → calls under way and their size
        self.held: dict[str, int] = {}  # worker → version its process really holds
        self.sent: dict[int, int] = {}

    def later(self, mean: float, act: Callable[[], None]) -> None:
        when = self.now + self.random.expovariate(1 / mean)
        self.agenda.append((when, len(self.agenda), act))

    def fault(self) -> bool:
        return self.hostile and self.random.random() < 0.12

    def run(self, tickets: int) -> None:
        for _ in range(tickets):
            self.later(3.0, self.submit)
        for _ in range(4):
            self.later(3.0, self.publish)
            self.later(3.0, lambda: self.core.resize(self.random.randint(1, 4)))
        for _ in range(20000):
            for command in self.core.step(self.now):
                self.execute(command)
            times = [item[0] for item in self.agenda]
            wake = self.core.wake_at(self.now)
            if not times and len(self.ended) == tickets:
                return
            assert times or wake is not None, f"stuck: {states(self.core)}, {self.core.stats(self.now)}"
            if wake is not None and (not times or wake < min(times)):
                self.now = wake
                continue
            self.agenda.sort(key=lambda item: item[:2])
            self.now, _, act = self.agenda.pop(0)
            act()
        raise AssertionError("no end")

    def submit(self) -> None:
        try:
            self.submitted_at[self.core.submit(self.now)] = self.version
        except (PoolFailed, WorkerBug) as error:
            self.ended[-1 - len(self.ended)] = Reject(-1, error)

    def publish(self) -> None:
        self.version += 1
        self.core.publish(self.version)

    def execute(self, command: Command) -> None:
        core = self.core
        match command:
            case Start(name):
                self.held[name] = -1
                if self.fault():
                    self.later(1.0, lambda: core.died(name, "start", self.now))
                else:
                    self.later(1.0, lambda: core.started(name, self.now))
            case Load(name, version):
                assert not self.open_calls.get(name), "loads under a call"
                if self.fault():
                    self.later(0.3, lambda: core.suspected(name, "load", self.now))
                else:
                    self.later(0.3, lambda: self.load(name, version))
            case Probe(name):
                self.later(0.1, lambda: core.probed(name, self.now))
            case Send(call, name, tickets):
                self.send(call, name, tickets)
            case End(name, _):
                self.open_calls.pop(name, None)
            case Deliver(ticket, _) | Reject(ticket, _):
                assert ticket not in self.ended, "answered twice"
                self.ended[ticket] = command

    def load(self, name: str, version: int) -> None:
        self.held[name] = version
        self.core.loaded(name, version, self.now)

    def send(self, call: int, name: str, tickets: tuple[int, ...]) -> None:
        calls = self.open_calls.setdefault(name, {})
        calls[call] = len(tickets)
        assert 1 <= len(tickets) <= self.settings.max_batch and len(calls) <= self.settings.max_inflight
        for ticket in tickets:
            assert self.held[name] >= self.submitted_at[ticket], "served by older weights"
            self.sent[ticket] = self.sent.get(ticket, 0) + 1
            assert self.sent[ticket] <= self.settings.max_retries + 1
        assert self.held[name] == self.version
        died, lost = self.fault(), self.fault()

        def end() -> None:
            calls.pop(call, None)
            if died:
                self.core.died(name, "killed", self.now)
            elif lost:
                self.core.suspected(name, "unreachable", self.now, call)
            else:
                self.core.answered(call, [BROKEN if self.fault() else Ok(ticket) for ticket in tickets], self.now)

        self.later(0.5, end)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 4),
    batch=st.integers(1, 5),
    inflight=st.integers(1, 3),
    hostile=st.booleans(),
)
def test_random_histories_keep_the_promises(seed: int, workers: int, batch: int, inflight: int, hostile: bool) -> None:
    settings = PoolSection(
        workers=workers, max_batch=batch, max_inflight=inflight, max_wait_s=0.2, max_retries=4, max_restarts=12
    )
    world = World(seed, settings, hostile)
    world.run(tickets=40)
    assert len(world.ended) == 40
    assert world.core.meter.restarts <= settings.max_restarts
    if not hostile:
        assert all(isinstance(command, Deliver) for command in world.ended.values())
        assert world.core.stats(world.now).done == 40


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
