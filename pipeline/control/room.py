"""Room for a pool that has lost its last worker, from a pool that can spare one; and back again.

A run whose only scorer stood on a lost node cannot go on, though two samplers stand elsewhere. So one of them leaves, and the scorer
starts in its bundle. As soon as the scorer's own bundle has a node again it moves home, the new process before the old one ends,
and the sampler returns. The rules (docs/faults.md):

* A pool is helped that has no live worker, and whose worker has had no room for ``PATIENCE_S``: Ray's own moves come first.
* A pool gives whose live workers are more than its ``autoscale.min``, whose worker's share holds what is needed, and which is not
  being helped itself. Of several the one with the most workers above its ``min``; of equals the one that comes later in a step.
* One worker is lent to a pool at a time. A giver always keeps one, so two pools never take the same room from each other in turn.
* A pool moves home when its bundle has been there for ``CALM_S``. Once home, it is not helped again before ``AGAIN_S`` have passed.
* A giver's size is only restored where nobody else has changed it meanwhile.

Not responsible for noticing lost nodes (Ray), or for how a pool replaces workers (``actors.pool``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from actors.pool.spec import PoolStats, WorkerStats
from actors.pool.state import ALIVE, S
from cluster.layout import Ask
from cluster.names import slot_of
from cluster.resources import Placement

log = logging.getLogger(__name__)

PATIENCE_S, CALM_S, AGAIN_S, MOVE_S = 15.0, 30.0, 120.0, 600.0
"""See the module's docstring; ``MOVE_S``: how long a worker may take to start at home before the move is given up for now."""

Resize = Callable[[str, int, str, str], Awaitable[None]]
"""Gives a pool a size: name, workers, by whom, and which worker is to leave first (empty: no matter)."""


@dataclass
class Loan:
    """A worker's place that ``giver`` lends to ``taker``. Times are those of the caller's clock, in seconds."""

    taker: str
    slot: int
    """Of the taker's worker that stands in the lent place."""
    home: tuple[str, int]
    """The taker's own bundle."""
    giver: str
    before: int
    """The giver's size before the loan."""
    left: int
    """… and during it."""
    there_since: float | None = None
    """Since when the taker's own bundle has had a node again."""
    mover: int | None = None
    """Slot of the worker that is starting at home."""
    mover_since: float = 0.0
    not_before: float = 0.0
    """No move home is begun earlier."""


def giver_of(
    taker: str, stats: Mapping[str, PoolStats], asks: Mapping[str, Ask], least: Mapping[str, int], busy: set[str]
) -> str | None:
    """Return which pool gives up a worker for ``taker``, or None where none can.

    ``stats`` are in the order of a step, ``least`` the pools' ``autoscale.min``, ``busy`` the pools that are being helped.
    """
    need, labels = asks[taker].bundle, asks[taker].labels
    found: list[tuple[int, int, str]] = []
    for place, (name, figures) in enumerate(stats.items()):
        spare = len(live(figures)) - max(1, least[name])
        share = asks[name].bundle
        holds = all(amount <= share.get(resource, 0.0) + 1e-9 for resource, amount in need.items())
        if spare > 0 and holds and name != taker and name not in busy and (not labels or labels == asks[name].labels):
            found.append((spare, place, name))
    return max(found)[2] if found else None


def live(figures: PoolStats) -> list[WorkerStats]:
    """Return the workers of a pool whose process is there."""
    return [worker for worker in figures.workers if worker.state in ALIVE]


class RoomMaker:
    """Lends places between pools; :meth:`turn` is called about once a second, and does what is due."""

    def __init__(self, placement: Placement, least: Mapping[str, int], resize: Resize) -> None:
        self.placement, self.least, self._resize = placement, dict(least), resize
        # What has no room of its own has none to lend and none to come back to: an autoscaler makes room for it.
        self.asks = {ask.role: ask for ask in placement.plan.asks if placement.plan.home(ask.role, 0)}
        self.loans: dict[str, Loan] = {}
        self._again: dict[str, float] = {}  # pools that were helped: not again before

    async def turn(self, now: float, stats: Mapping[str, PoolStats], roomless: Mapping[str, float]) -> None:
        """Go on with what is lent, and lend to a pool that needs it. ``roomless``: workers without room → since when."""
        self._forget(stats)
        for loan in list(self.loans.values()):
            await self._go_on(loan, now, stats[loan.taker], stats[loan.giver])
        for name, figures in stats.items():
            if name in self.loans or name not in self.asks or now < self._again.get(name, 0.0):
                continue
            waiting = [w.name for w in figures.workers if now - roomless.get(w.name, now) >= PATIENCE_S]
            if waiting and not any(w.state in ALIVE or w.placed for w in figures.workers):
                await self._lend(name, slot_of(min(waiting, key=slot_of)), stats)

    async def _lend(self, taker: str, slot: int, stats: Mapping[str, PoolStats]) -> None:
        known = {name: figures for name, figures in stats.items() if name in self.asks}
        giver = giver_of(taker, known, self.asks, self.least, set(self.loans))
        if giver is None:
            return
        leaving = max(live(stats[giver]), key=lambda worker: slot_of(worker.name)).name
        before, left = stats[giver].target, len(live(stats[giver])) - 1
        log.warning(
            "pool %s has no worker, and no room for one: pool %s gives up worker %s for it, until there is room again",
            *(taker, giver, leaving),
        )
        key, theirs = (taker, slot), (giver, slot_of(leaving))
        home, bundle = self.placement.lent.get(key, key), self.placement.lent.get(theirs, theirs)
        self.loans[taker] = Loan(taker, slot, home, giver, before, left)
        self.placement.give_back(*theirs)
        self.placement.lend(*key, bundle)
        await self._resize(giver, left, f"room for {taker}", leaving)

    async def _go_on(self, loan: Loan, now: float, taker: PoolStats, giver: PoolStats) -> None:
        by_slot = {slot_of(w.name): w for w in taker.workers if w.state is not S.RETIRED}
        ends = {slot_of(w.name) for w in taker.workers if w.state is S.RETIRED}
        if loan.mover is not None:
            await self._move(loan, now, taker, giver, by_slot, ends)
            return
        there = await asyncio.to_thread(self.placement.is_there, loan.home)
        loan.there_since = (now if loan.there_since is None else loan.there_since) if there else None
        if loan.slot not in by_slot:  # the pool was made smaller, and this worker left
            await self._settle(loan, now, giver)
        elif not there or loan.there_since is None or now - loan.there_since < CALM_S or now < loan.not_before:
            return
        elif by_slot[loan.slot].state not in ALIVE:  # it has not begun in the lent place: it need not
            await self._settle(loan, now, giver)
        else:
            free = next(slot for slot in range(len(by_slot) + 1) if slot not in by_slot)  # as the pool will choose
            loan.mover, loan.mover_since = free, now
            self.placement.lend(loan.taker, loan.mover, loan.home)
            await self._resize(loan.taker, taker.target + 1, "its own room is back", "")

    async def _move(
        self,
        loan: Loan,
        now: float,
        taker: PoolStats,
        giver: PoolStats,
        by_slot: Mapping[int, WorkerStats],
        ends: set[int],
    ) -> None:
        """The worker at home serves: the one in the lent place leaves. When that is gone, the giver has its place again."""
        assert loan.mover is not None
        mover, old = by_slot.get(loan.mover), by_slot.get(loan.slot)
        if old is None:
            if loan.slot not in ends:  # its last calls have finished
                await self._settle(loan, now, giver)
        elif mover is not None and mover.state is S.READY:
            await self._resize(loan.taker, taker.target - 1, "it is at home again", old.name)
        elif mover is None or now - loan.mover_since > MOVE_S:
            self.placement.give_back(loan.taker, loan.mover)
            loan.mover, loan.there_since, loan.not_before = None, None, now + AGAIN_S
            if mover is not None:
                await self._resize(loan.taker, taker.target - 1, "its own room was lost again", mover.name)

    async def _settle(self, loan: Loan, now: float, giver: PoolStats) -> None:
        """End the loan."""
        del self.loans[loan.taker]
        self._again[loan.taker] = now + AGAIN_S
        self.placement.give_back(loan.taker, loan.slot)
        if (loan.taker, loan.slot) != loan.home and loan.mover is None:
            self.placement.lend(loan.taker, loan.slot, loan.home)
        if giver.target == loan.left:
            log.warning(
                "pool %s has room of its own again: pool %s returns to %d workers",
                *(loan.taker, loan.giver, loan.before),
            )
            await self._resize(loan.giver, loan.before, f"{loan.taker} has room again", "")

    def _forget(self, stats: Mapping[str, PoolStats]) -> None:
        """Free the bundles of others in which a worker stood that has left for good."""
        kept = {(loan.taker, slot) for loan in self.loans.values() for slot in (loan.slot, loan.mover)}
        for role, slot in list(self.placement.lent):
            if (role, slot) not in kept and not any(slot_of(w.name) == slot for w in stats[role].workers):
                self.placement.give_back(role, slot)
