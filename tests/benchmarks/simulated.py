"""Stages over pools whose workers only sleep: the real pools, dispatchers and stage coroutines, and a clock that jumps.

Workers stand behind ``actors.pool.remote.Transport``: they answer with well-formed records after the seconds that a real worker of
the tiny pair took for such a call (``service_times.json``, written by ``python -m tests.benchmarks.record``). On
:class:`VirtualLoop` an hour of sleeping takes no time, so hundreds of workers fit into one process and every run repeats itself.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from actors.failures import Ok
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo
from actors.records import Clip, Completion, Sample, Scores
from cluster.resources import Placement
from pipeline.config import RunConfig, load_config
from pipeline.data.source import Cursor
from pipeline.fleet.open import Fleet, pool_sections
from pipeline.stages.feed import FeedCursor
from pipeline.stages.stage1 import Stage1
from tests.actors.pool.limits import limits as limits_of

T = TypeVar("T")
RECORDED = Path(__file__).with_name("service_times.json")
POOLS = ("vlm", "vdm", "reward")
FRAMES = np.zeros((4, 8, 8, 3), np.uint8)


class _Selector(selectors.DefaultSelector):
    """Does not wait: the loop's clock jumps by as much instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("the simulation waits for something that will never come")
            self.loop.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time()`` is the simulation's; nothing in it may wait for a thread."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-6  # sums of floats fall short of a deadline by less

    def time(self) -> float:
        """Return the simulated seconds since the start."""
        return self.now


def simulate(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``work()`` on a clock that jumps."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())


Service = Callable[[str, int], float]
"""Seconds of a call, by the worker's pool and the number of requests in it."""


@dataclass(frozen=True)
class Recorded:
    """Service times as recorded: by pool and number of requests in the call. Draws are seeded."""

    calls: dict[str, dict[int, tuple[float, ...]]]
    update_s: tuple[float, ...]
    publish_s: tuple[float, ...]

    @classmethod
    def load(cls, path: Path = RECORDED) -> Recorded:
        """Return what ``tests.benchmarks.record`` wrote."""
        plain = json.loads(path.read_text())
        calls: dict[str, dict[int, list[float]]] = {pool: defaultdict(list) for pool in POOLS}
        for pool, found in plain["calls"].items():
            for requests, seconds in found:
                calls[pool][requests].append(seconds)
        whole = {pool: {n: tuple(s) for n, s in by.items()} for pool, by in calls.items()}
        return cls(whole, tuple(plain["update_s"]), tuple(plain["publish_s"]))

    def service(self, seed: int) -> Service:
        """Return service times drawn from the recorded ones; a call of a size that was never seen scales the nearest."""
        draw = random.Random(seed)

        def seconds(pool: str, requests: int) -> float:
            by = self.calls[pool]
            nearest = min(by, key=lambda n: (abs(n - requests), n))
            recorded = draw.choice(by[nearest])
            return recorded if nearest == requests else recorded * requests / nearest

        return seconds


@dataclass
class Sleepers:
    """A transport whose workers sleep; ``work_s`` is the time that they were busy, all together."""

    pool: str
    service: Service
    load_s: float = 0.0
    work_s: float = 0.0
    calls: int = 0
    requests: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Beginning and end of each call."""
    version: dict[str, int] = field(default_factory=dict)

    async def make(self, make_worker: Callable[[str], Any], name: str) -> Any:
        return make_worker(name)

    def ready(self, handle: Any) -> asyncio.Future[Any]:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def ask(self, handle: str, method: str, args: tuple[Any, ...], *, timeout_s: float, who: str) -> Any:
        if method == "process":
            requests = args[0]
            seconds = self.service(self.pool, len(requests))
            began = asyncio.get_running_loop().time()
            await asyncio.sleep(seconds)
            self.work_s += seconds
            self.calls += 1
            self.requests += len(requests)
            self.spans.append((began, began + seconds))
            return [Ok(ANSWERS[self.pool](request, self.version[handle])) for request in requests]
        if method == "load_weights":
            await asyncio.sleep(self.load_s)
            self.version[handle] = args[0]
            return args[0]
        if method == "setup":
            return WorkerInfo(handle, "127.0.0.1", 0, "cpu", "simulated")
        return {"counters": {}, "weights_hash": "simulated", "ping": "pong"}[method]

    def kill(self, handle: Any) -> None:
        pass

    def close(self) -> None:
        pass


def complete(request: Any, version: int) -> list[Completion]:
    """G completions whose captions all differ: the artist has the most to draw that there can be."""
    tokens, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
    words = [f"<think>a</think><ans>{request.sample_id} {i}</ans>" for i in range(request.n)]
    return [Completion(text, tokens, logprobs, "stop", version) for text in words]


def draw(request: Any, version: int) -> Clip:
    """A grey clip."""
    return Clip(request.sample_id, request.index, request.caption, FRAMES, version)


def score(request: Any, version: int) -> Scores:
    """Values that depend on what was asked alone."""
    value = random.Random(f"{request.sample_id}/{request.index}/{request.caption}").random()
    return Scores(request.sample_id, request.index, dict.fromkeys(request.components, value))


ANSWERS: dict[str, Callable[[Any, int], Any]] = {"vlm": complete, "vdm": draw, "reward": score}


@dataclass
class Cluster:
    """A fleet of sleeping workers, and the stage that runs on it."""

    config: RunConfig
    transports: dict[str, Sleepers]
    fleet: Fleet

    async def __aenter__(self) -> Cluster:
        await asyncio.gather(*(pool.start() for pool in self.fleet.pools()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(pool.close() for pool in self.fleet.pools()))

    @property
    def requests(self) -> int:
        """Requests answered by all pools."""
        return sum(transport.requests for transport in self.transports.values())

    def lower_bound_s(self) -> float:
        """The seconds below which no schedule gets: the busiest pool's work, divided by what it can do at once."""
        return max(
            transport.work_s / (pool.settings.workers * pool.settings.max_inflight)
            for transport, pool in zip(self.transports.values(), self.fleet.pools(), strict=True)
        )


def cluster(
    service: Service,
    workers: Sequence[int],
    *,
    group_size: int = 8,
    load_s: float = 0.0,
    limits: Any = None,
    **stage: Any,
) -> Cluster:
    """Return a fleet of ``workers`` (VLM, VDM, reward) sleepers of the toy run's limits; ``stage`` goes into its stage 1.

    ``limits`` by pool replace the toy run's limits.
    """
    overrides = [f"stage1.rollout.group_size={group_size}"]
    overrides += [f"stage1.{key}={value}" for key, value in stage.items()]
    config = load_config("toy", overrides)
    transports = {pool: Sleepers(pool, service, load_s if pool == "vlm" else 0.0) for pool in POOLS}
    pools = []
    for name, count in zip(POOLS, workers, strict=True):
        base = pool_sections(config)[name]
        known = {key: getattr(base, key) for key in ("max_batch", "max_inflight", "max_wait_s")}
        more = (limits or {}).get(name, {})
        of_pool = limits_of(**(known | {"workers": count, "request_timeout_s": 1e6, "probe_every_s": 1e6} | more))
        pools.append(WorkerPool(name, lambda worker: worker, *of_pool, transport=transports[name]))
    return Cluster(config, transports, Fleet(dict(zip(POOLS, pools, strict=True)), cast(Placement, None)))


def sample(number: int) -> Sample:
    """A sample of hardly any bytes."""
    return Sample(f"s{number}", "predictive", "what comes next", "a circle moves up", FRAMES, FRAMES)


async def groups(stage: Stage1, count: int, window: int | None = None) -> None:
    """Carry ``count`` samples through ``stage``, at most ``window`` at a time (None: all)."""
    room = asyncio.Semaphore(window or count)

    async def one(number: int) -> None:
        try:
            group = await stage.group(sample(number), "0")
            assert group is not None and not group.failures
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            await room.acquire()
            tasks.create_task(one(number))


@dataclass
class Feed:
    """Samples without end."""

    cursor: FeedCursor = field(default_factory=lambda: FeedCursor(Cursor(epoch=0, position=0)))
    quarantined: tuple[()] = ()

    async def draw(self, count: int) -> list[Sample]:
        """Return the next ``count`` samples."""
        first = self.cursor.source.position
        self.cursor = FeedCursor(Cursor(epoch=0, position=first + count))
        return [sample(first + i) for i in range(count)]


@dataclass
class SleepingLearner:
    """A learner group that takes its time and learns nothing."""

    update_s: Callable[[], float]
    version: int = 0
    seen: list[tuple[str, ...]] = field(default_factory=list)
    """Whom each update learnt from."""

    async def update(self, items: Sequence[Any], *, updates: int, epochs: int) -> dict[str, float]:
        """Sleep; the version counts on."""
        await asyncio.sleep(self.update_s())
        self.seen.append(tuple(f"{item.sample_id}/{item.index}" for item in items))
        self.version += 1
        return {"loss": 0.0}

    async def publish(self, *, receivers: int = 0) -> list[Any]:
        """Nothing travels."""
        return []

    async def base_hash(self) -> str:
        """It never changes."""
        return "simulated"
