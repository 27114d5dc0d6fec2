"""The dispatcher without Ray or a clock: random histories must keep its promises."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.failures import Ok
from actors.pool.commands import Command, Deliver, End, Load, Probe, Reject, Send, Start
from actors.pool.dispatch import Dispatcher
from actors.pool.errors import PoolFailed, WorkerBug
from actors.pool.settings import PoolSection, Watch
from tests.actors.pool.dispatching import BROKEN, states


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
