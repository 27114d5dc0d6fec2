"""What stands for a pool, a learner or a fleet in tests has no method that the real class has not, and takes no other calls.

A fake that outlives a renamed method would keep its tests green while nothing calls it any more. mypy holds the tests to the names
of real objects; a fake is handed over past the types, so it is held to its class here.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from actors.learner.group import LearnerGroup
from actors.pool.pool import WorkerPool
from pipeline.data.source import SampleSource
from pipeline.fleet.open import Fleet
from pipeline.stages.feed import SampleFeed
from tests.benchmarks import simulated
from tests.pipeline.run import test_alarm_stop, test_handover, test_recovery
from tests.pipeline.stages import test_alarms, test_anchors, test_feed, test_loop, test_speed, test_stage1, test_stage2

pytestmark = pytest.mark.slow

FAKES: list[tuple[type, type]] = [
    (test_loop.Pool, WorkerPool),
    (test_speed.Pool, WorkerPool),
    (test_recovery.ServingPool, WorkerPool),
    (test_handover.Pool, WorkerPool),
    (test_stage1.Thinker, WorkerPool),
    (test_stage1.Artist, WorkerPool),
    (test_stage1.Judge, WorkerPool),
    (test_stage2.Here, WorkerPool),
    (test_stage2.Thinker, WorkerPool),
    (test_anchors.SureThinker, WorkerPool),
    (test_alarms.Thinker, WorkerPool),
    (test_alarms.Renderer, WorkerPool),
    (test_loop.Learner, LearnerGroup),
    (test_alarm_stop.SavingLearner, LearnerGroup),
    (test_recovery.CountingLearner, LearnerGroup),
    (test_handover.Learner, LearnerGroup),
    (simulated.SleepingLearner, LearnerGroup),
    (test_feed.Numbers, SampleSource),
    (test_anchors.Captions, SampleSource),
    (simulated.Feed, SampleFeed),
    (test_alarms.Toys, SampleFeed),
]
FLEETS: list[type] = [test_loop.Fleet, test_stage1.Fleet, test_stage2.Fleet, test_alarms.Fleet]


def methods(kind: type) -> dict[str, Any]:
    return {name: found for name, found in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}


def unlike(fake: type, real: type) -> list[str]:
    """What ``fake`` does otherwise than ``real``: a method that is not there, an argument of another name, a missing await."""
    found, theirs = [], methods(real)
    for name, method in methods(fake).items():
        if name not in theirs:
            found.append(f"{real.__name__} has no {name}()")
            continue
        ours, true = (inspect.signature(each).parameters.values() for each in (method, theirs[name]))
        if inspect.iscoroutinefunction(method) != inspect.iscoroutinefunction(theirs[name]):
            found.append(f"{name}() is awaited in one and not in the other")
        places = [[p for p in one if p.kind is p.POSITIONAL_OR_KEYWORD] for one in (ours, true)]
        if len(places[0]) > len(places[1]):
            found.append(f"{name}() takes {len(places[0]) - 1} arguments, the real one {len(places[1]) - 1}")
        keywords = [{p.name for p in one if p.kind is p.KEYWORD_ONLY} for one in (ours, true)]
        found += [f"{name}() of {real.__name__} has no {key}" for key in sorted(keywords[0] - keywords[1])]
    return found


@pytest.mark.parametrize(
    ("fake", "real"), FAKES, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
)
def test_a_fake_is_asked_as_the_real_one_is(fake: type, real: type) -> None:
    assert unlike(fake, real) == []
    assert methods(fake)


@pytest.mark.parametrize("fake", FLEETS, ids=lambda kind: kind.__module__.rpartition(".")[2])
def test_a_fake_fleet_has_no_part_that_a_fleet_has_not(fake: type) -> None:
    real = {field.name for field in fields(Fleet)} | {name for name in dir(Fleet) if not name.startswith("_")}
    assert {field.name for field in fields(fake)} | set(methods(fake)) <= real


def test_a_fake_that_was_left_behind_is_found() -> None:
    class Behind:
        async def submit(self, request: Any, now: bool) -> Any: ...
        def call_all(self, method: str, *, within_s: float) -> None: ...
        def renamed(self) -> None: ...

    assert unlike(Behind, WorkerPool) == [
        "call_all() is awaited in one and not in the other",
        "call_all() of WorkerPool has no within_s",
        "WorkerPool has no renamed()",
        "submit() takes 2 arguments, the real one 1",
    ]
