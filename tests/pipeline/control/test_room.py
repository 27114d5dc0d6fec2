"""Places that pools lend one another: real pools and placements on simulated nodes, in simulated seconds of one turn each.

A node has bundles of one worker, and there is no other room. A worker whose node is lost answers nothing more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.failures import Ok
from actors.pool import pool as pool_module
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo
from actors.pool.remote import WorkerGone
from actors.pool.settings import PoolSection, Watch
from actors.pool.spec import PoolStats, WorkerStats
from actors.pool.state import COMING, S
from cluster.layout import Ask, PlacementPlan
from cluster.names import worker_name
from cluster.resources import Placement
from pipeline.control.room import AGAIN_S, CALM_S, PATIENCE_S, RoomMaker, giver_of

pytestmark = pytest.mark.slow

Bundle = tuple[str, int]
TURN_S = 0.01  # of real time, in which pools do what is due


class Nodes:
    """Which node each bundle lies on, which nodes live, and whose process is in which bundle."""

    def __init__(self, homes: dict[Bundle, str]) -> None:
        self.homes, self.lost = homes, set[str]()
        self.inside: dict[Bundle, str] = {}
        self.dead: set[str] = set()  # processes that were ended, or whose node was

    def lose(self, node: str) -> None:
        self.lost.add(node)
        for bundle in [bundle for bundle in self.inside if self.homes[bundle] == node]:
            self.dead.add(self.inside.pop(bundle))

    def is_lost(self, group: str, index: int) -> bool:
        return self.homes[group, index] in self.lost


class Processes:
    """A pool's transport: a worker is a name in a bundle, or waits for its bundle; without one it waits for ever."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    async def make(self, make_worker: Callable[[str], Any], name: str) -> Any:
        strategy = make_worker(name).get("scheduling_strategy")
        bundle = (strategy.placement_group, strategy.placement_group_bundle_index) if strategy else None
        return f"{name} #{next(PROCESS)}", bundle

    def ready(self, handle: Any) -> asyncio.Future[Any]:
        process, bundle = handle

        async def placed() -> None:
            nodes = self.nodes
            while bundle is None or bundle in nodes.inside or nodes.is_lost(*bundle):
                await asyncio.sleep(TURN_S / 4)
                if process in nodes.dead:
                    raise WorkerGone("it was ended")
            nodes.inside[bundle] = process

        return asyncio.ensure_future(placed())

    async def ask(self, handle: Any, method: str, args: tuple[Any, ...], *, timeout_s: float, who: str) -> Any:
        process, bundle = handle
        await asyncio.sleep(0)
        if process in self.nodes.dead:
            raise WorkerGone("its node is gone")
        if method == "setup":
            return WorkerInfo(process.split()[0], self.nodes.homes[bundle], 1, "cpu")
        return args[0] if method == "load_weights" else [Ok((request, bundle)) for request in (args or ([],))[0]]

    def kill(self, handle: Any) -> None:
        process, bundle = handle
        self.nodes.dead.add(process)
        if self.nodes.inside.get(bundle) == process:
            del self.nodes.inside[bundle]

    def close(self) -> None:
        pass


PROCESS = itertools.count()


class World:
    """Pools ``vdm`` (two workers on node a) and ``reward`` (one on node b), what makes room between them, and its clock."""

    def __init__(self, vdm: int = 2, reward_cpus: float = 1.0, least: int = 1) -> None:
        asks = (Ask("vdm", vdm, 1.0), Ask("reward", 1, reward_cpus))
        homes = {("vdm", slot): "a" for slot in range(vdm)} | {("reward", 0): "b"}
        self.nodes, self.now = Nodes(homes), 0.0
        self.placement = Placement(PlacementPlan(asks), {"vdm": "vdm", "reward": "reward"}, self.nodes.is_lost)
        self.pools = {ask.role: self._pool(ask) for ask in asks}
        self.resizes: list[tuple[str, int]] = []
        self.room = RoomMaker(self.placement, {"vdm": least, "reward": 1}, self._resize)
        self.since: dict[str, float] = {}

    def _pool(self, ask: Ask) -> WorkerPool:
        name = ask.role
        return WorkerPool(
            name,
            lambda worker: self.placement.options(name, worker),
            PoolSection(workers=ask.count, max_wait_s=0.0),
            Watch(probe_every_s=TURN_S, backoff_s=TURN_S, max_backoff_s=TURN_S),
            reconsider=lambda worker: self.placement.reconsider(name, worker),
            transport=Processes(self.nodes),
        )

    async def _resize(self, name: str, workers: int, by: str, leaving: str) -> None:
        self.resizes.append((name, workers))
        await self.pools[name].resize(workers, leaving=leaving)

    async def turns(self, count: float) -> None:
        for _ in range(int(count)):
            self.now += 1.0
            stats = {name: pool.stats() for name, pool in self.pools.items()}
            waiting = [w.name for s in stats.values() for w in s.workers if w.state in COMING and not w.placed]
            self.since = {name: self.since.get(name, self.now) for name in waiting}
            await self.room.turn(self.now, stats, self.since)
            await asyncio.sleep(TURN_S)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(400):
            if condition():
                return
            await self.turns(1)
        raise AssertionError([pool.stats() for pool in self.pools.values()])

    async def lose_and_help(self) -> None:
        """Lose node b; return when the scorer serves in the lent place."""
        self.nodes.lose("b")
        await self.until(lambda: self.ready("reward") == 0)
        await self.until(lambda: self.ready("reward") == 1)

    def ready(self, name: str) -> int:
        return self.pools[name].stats().ready

    async def place_of(self, pool: str) -> Bundle:
        """Return the bundle of the worker that answers."""
        found: Bundle = (await asyncio.wait_for(self.pools[pool].submit("where"), 5.0))[1]
        return found


def run(story: Callable[[World], Awaitable[None]], **world: Any) -> None:
    async def whole() -> None:
        made = World(**world)
        try:
            await asyncio.gather(*(pool.start() for pool in made.pools.values()))
            await story(made)
        finally:
            await asyncio.gather(*(pool.close() for pool in made.pools.values()))

    asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "RECONSIDER_S", TURN_S)


def test_a_pool_without_a_worker_is_lent_a_place_and_both_are_as_before_when_the_node_is_back() -> None:
    async def story(world: World) -> None:
        assert await world.place_of("reward") == ("reward", 0)
        world.nodes.lose("b")
        asked = asyncio.create_task(world.pools["reward"].submit("waits"))
        await world.turns(PATIENCE_S)
        assert world.resizes == [] and not asked.done()  # Ray's own moves come first
        await world.until(lambda: world.ready("reward") == 1)
        assert (await asked)[1] == ("vdm", 1) and world.ready("vdm") == 1
        await world.turns(4 * CALM_S)
        assert world.resizes == [("vdm", 1)]
        world.nodes.lost.clear()
        await world.until(lambda: world.ready("vdm") == 2)
        assert world.resizes == [("vdm", 1), ("reward", 2), ("reward", 1), ("vdm", 2)]
        assert await world.place_of("reward") == ("reward", 0) and world.ready("reward") == 1 and not world.room.loans
        await world.turns(4 * CALM_S)
        assert len(world.resizes) == 4

    run(story)


def test_the_pool_that_was_helped_answers_all_the_while_it_moves_home() -> None:
    async def story(world: World) -> None:
        await world.lose_and_help()
        world.nodes.lost.clear()
        while world.room.loans:
            await world.turns(1)
            assert world.ready("reward") >= 1
            await world.place_of("reward")

    run(story)


def test_a_node_that_comes_and_goes_moves_nobody_until_it_stays() -> None:
    async def story(world: World) -> None:
        await world.lose_and_help()
        for _ in range(6):
            world.nodes.lost.clear()
            await world.turns(CALM_S / 2)
            world.nodes.lose("b")
            await world.turns(3)
        assert world.resizes == [("vdm", 1)]

    run(story)


def test_a_home_that_is_lost_during_the_move_leaves_the_lent_place_as_it_is_and_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.control.room.MOVE_S", 20.0)

    async def story(world: World) -> None:
        await world.lose_and_help()
        world.nodes.lost.clear()
        world.nodes.inside["reward", 0] = "a stranger"  # so that the mover waits
        await world.until(lambda: ("reward", 2) in world.resizes)
        world.nodes.lose("b")
        await world.until(lambda: world.resizes[-1] == ("reward", 1))
        await world.turns(3)
        assert await world.place_of("reward") == ("vdm", 1) and world.pools["reward"].stats().target == 1
        world.nodes.lost.clear()
        await world.turns(AGAIN_S / 2)
        assert world.resizes == [("vdm", 1), ("reward", 2), ("reward", 1)]
        await world.until(lambda: world.ready("vdm") == 2)
        assert await world.place_of("reward") == ("reward", 0)

    run(story)


def test_a_second_loss_is_helped_as_the_first_was_after_a_pause() -> None:
    async def story(world: World) -> None:
        for _ in range(2):
            began = world.now
            await world.lose_and_help()
            helped = world.now - began
            world.nodes.lost.clear()
            await world.until(lambda: world.ready("vdm") == 2)
        assert helped >= AGAIN_S - 5 and len(world.resizes) == 8
        assert await world.place_of("reward") == ("reward", 0)

    run(story)


def test_where_the_own_room_is_back_before_the_lent_one_is_free_nobody_moves_twice() -> None:
    async def story(world: World) -> None:
        world.nodes.lose("b")
        busy = world.nodes.inside["vdm", 1]
        await world.turns(PATIENCE_S)
        world.nodes.inside["vdm", 1] = "a process that does not end"
        await world.until(lambda: world.resizes == [("vdm", 1)])
        world.nodes.lost.clear()
        await world.turns(CALM_S + 5)
        assert world.resizes == [("vdm", 1), ("vdm", 2)] and await world.place_of("reward") == ("reward", 0)
        world.nodes.inside.pop(("vdm", 1))
        await world.until(lambda: world.ready("vdm") == 2)
        assert busy in world.nodes.dead

    run(story)


@pytest.mark.parametrize(
    "world", [{"vdm": 1}, {"least": 2}, {"reward_cpus": 2.0}], ids=["its only one", "its min", "a larger worker"]
)
def test_nothing_is_lent_where_no_pool_can_spare_a_place_that_holds_the_worker(world: dict[str, Any]) -> None:
    async def story(made: World) -> None:
        made.nodes.lose("b")
        await made.turns(4 * PATIENCE_S)
        assert made.resizes == [] and made.ready("reward") == 0
        made.nodes.lost.clear()
        await made.until(lambda: made.ready("reward") == 1)

    run(story, **world)


def test_a_size_that_a_person_gave_the_lender_meanwhile_stays() -> None:
    async def story(world: World) -> None:
        await world.lose_and_help()
        await world.pools["vdm"].resize(3)  # two of them wait for room
        world.nodes.lost.clear()
        await world.until(lambda: not world.room.loans and world.ready("vdm") == 2)  # the lent place is theirs again
        assert world.pools["vdm"].stats().target == 3 and ("vdm", 2) not in world.resizes

    run(story, vdm=2)


def stats_of(name: str, alive: int, waiting: int = 0) -> PoolStats:
    states = [S.READY] * alive + [S.RESTARTING] * waiting
    workers = tuple(WorkerStats(worker_name(name, i), s, 0, 0, 0, s is S.READY) for i, s in enumerate(states))
    zeros = dict.fromkeys(("queue_wait_s", "service_s", "queue_wait_total_s", "service_total_s", "batch_mean"), 0.0)
    zeros |= dict.fromkeys(("busy_ratio", "busy_total_s", "worker_total_s", "oldest_wait_s", "requests_per_min"), 0.0)
    counts = dict.fromkeys(("queue_len", "inflight", "done", "retries", "restarts"), 0)
    return PoolStats(name, 0, len(states), alive, workers, **zeros, **counts)


@pytest.mark.parametrize(
    ("alive", "least", "asks", "helped", "giver"),
    [
        ({"vlm": 2, "vdm": 3}, {}, {}, set(), "vdm"),  # the most to spare
        ({"vlm": 2, "vdm": 2}, {}, {}, set(), "vdm"),  # of equals the later one in a step
        ({"vlm": 2, "vdm": 3}, {"vdm": 3}, {}, set(), "vlm"),
        ({"vlm": 2, "vdm": 3}, {}, {"vdm": Ask("vdm", 3, 0.1)}, set(), "vlm"),
        ({"vlm": 2, "vdm": 3}, {}, {"reward": Ask("reward", 1, 0.5, labels={"disk": "ssd"})}, set(), None),
        ({"vlm": 2, "vdm": 3}, {}, {}, {"vdm"}, "vlm"),
        ({"vlm": 1, "vdm": 1}, {}, {}, set(), None),
    ],
)
def test_which_pool_gives(
    alive: dict[str, int], least: dict[str, int], asks: dict[str, Ask], helped: set[str], giver: str | None
) -> None:
    all_asks = {name: Ask(name, 1, 0.5, gpus) for name, gpus in (("vlm", 1.0), ("vdm", 1.0), ("reward", 0.0))} | asks
    stats = {name: stats_of(name, alive.get(name, 0), waiting=1) for name in all_asks}
    assert giver_of("reward", stats, all_asks, dict.fromkeys(all_asks, 1) | least, helped) == giver
