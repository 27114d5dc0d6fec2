"""A dispatcher and its commands, for tests without Ray or a clock."""

from __future__ import annotations

from actors.failures import Failure
from actors.pool.commands import Command, Load, Probe, Start
from actors.pool.dispatch import Dispatcher
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
