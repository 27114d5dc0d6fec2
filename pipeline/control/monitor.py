"""The run's own side: looks at the pools about once a second, and does what the autoscaler and ``vans scale`` ask for.

Each look goes to the board (``actors.control``), to Ray's metrics, now and then to ``pools.jsonl``, to the autoscaler, and to what
makes room for a pool that has lost its last worker (``room``).
Training never waits for any of it, and nothing that fails here reaches it: a trouble is logged once, a board that died is
replaced up to ``MOST_BOARDS`` times and then done without.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actors.control import open_board
from actors.pool.pool import WorkerPool
from actors.pool.remote import WorkerGone, WorkerRaised, WorkerUnreachable, ask
from actors.pool.settings import AutoscaleSection
from actors.pool.spec import PoolStats
from cluster.errors import WorkerTimeoutError
from cluster.resources import Placement, amounts, view
from pipeline.config import RunConfig
from pipeline.config.machinery import ControlSection
from pipeline.control.autoscale import Autoscaler, PoolPoint
from pipeline.control.exporter import Exporter
from pipeline.control.record import RunRecord, new_record, utc_now
from pipeline.control.room import RoomMaker
from pipeline.control.snapshot import Resize, RunView, pool_view
from pipeline.control.trace import TRACE_FILE
from pipeline.fleet.kinds import section_of
from pipeline.fleet.open import Fleet, open_fleet

log = logging.getLogger(__name__)

MOST_BOARDS = 4
BOARD_TIMEOUT_S = 60.0
"""Longest wait for the board beyond the time it may hold an exchange; its first start is within it."""
ROOM_GRACE_S = 3.0
"""A worker is said to have no room once it has had none for so long: with room too, Ray takes a moment to give it."""
KEPT_RESIZES = 5


@asynccontextmanager
async def supervised_fleet(config: RunConfig) -> AsyncIterator[Fleet]:
    """Open the run's fleet, and let other processes watch and resize it for the length of the block."""
    import ray

    record = new_record(config.name, ray.get_runtime_context().gcs_address)
    _write(record, config.out)
    try:
        async with open_fleet(config) as fleet:
            limits = {pool.name: section_of(config, pool.name).autoscale for pool in fleet.pools()}
            pools = list(fleet.pools())
            async with supervised(pools, record, config.out, config.control, limits, fleet.placement):
                yield fleet
    finally:  # also where the fleet did not open
        _write_end(record, config.out)


@asynccontextmanager
async def supervised(
    pools: Sequence[WorkerPool],
    record: RunRecord,
    out: Path,
    settings: ControlSection,
    limits: Mapping[str, AutoscaleSection] | None = None,
    placement: Placement | None = None,
) -> AsyncIterator[Monitor]:
    """Watch ``pools``, which serve, for the length of the block; ``limits`` are the autoscalers by pool.

    ``placement`` is where they stand: within it one makes room for another that has lost its last worker.
    """
    monitor = Monitor(pools, record, out, settings, limits or {}, placement)
    task = asyncio.create_task(monitor.run(), name="monitor")
    _write(dataclasses.replace(record, state="running"), out)
    try:
        yield monitor
    finally:
        _write_end(record, out)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        monitor.close()


class Monitor:
    """See the module's docstring. Lives in the event loop that owns the pools."""

    def __init__(
        self,
        pools: Sequence[WorkerPool],
        record: RunRecord,
        out: Path,
        settings: ControlSection,
        limits: Mapping[str, AutoscaleSection],
        placement: Placement | None = None,
    ) -> None:
        self.pools = {pool.name: pool for pool in pools}
        self.record, self.out, self.settings = record, out, settings
        self.limits = {name: limits.get(name, AutoscaleSection()) for name in self.pools}
        self.autoscalers = {name: Autoscaler(section) for name, section in self.limits.items() if section.enabled}
        least = {name: section.min for name, section in self.limits.items()}
        self._room = RoomMaker(placement, least, self._resize) if placement is not None else None
        self.resizes: deque[Resize] = deque(maxlen=KEPT_RESIZES)
        self._exporter: Exporter | None = None
        self._board: Any = None
        self._boards = 0
        self._answers: dict[int, str] = {}
        self._next_line = 0.0
        self._roomless: dict[str, float] = {}  # workers without room, since when
        self._troubles: set[str] = set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="monitor")

    async def run(self) -> None:
        """Look and act until cancelled."""
        while True:
            began = time.monotonic()
            try:
                await self._turn(began)
            except Exception as error:  # noqa: BLE001 - a failed look must not end the looking, nor the run
                self._trouble("a look at the pools", error)
            # An exchange ends early when a request arrives; the next one brings its answer back at once.
            left = self.settings.every_s - (time.monotonic() - began)
            if left > 0 and not self._answers:
                await asyncio.sleep(left)

    async def _turn(self, now: float) -> None:
        stats = {name: pool.stats() for name, pool in self.pools.items()}
        points = {name: PoolPoint.of(figures, now) for name, figures in stats.items()}
        try:
            await self._autoscale(points)
        except Exception as error:  # noqa: BLE001 - a pool that has failed; the others are shown all the same
            self._trouble("the autoscaler", error)
        try:
            self._export(stats)
        except Exception as error:  # noqa: BLE001 - the rest does not need Ray's metrics
            self._trouble("Ray's metrics", error)
        await self._line(points, now)
        seen = await self._look(stats)
        if self._room is not None:
            try:
                await self._room.turn(now, stats, self._roomless)
            except Exception as error:  # noqa: BLE001 - as above, and Ray's tables are in flux when a node dies
                self._trouble("making room for a pool", error)
        await self._exchange(seen)

    def close(self) -> None:
        """End the board."""
        self._drop_board()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- what is looked at

    async def _look(self, stats: Mapping[str, PoolStats]) -> RunView:
        without_room: dict[str, list[str]] = {}
        free = ""
        try:
            async with asyncio.timeout(BOARD_TIMEOUT_S):
                for name, figures in stats.items():
                    if not all(worker.placed for worker in figures.workers):
                        without_room[name] = await self.pools[name].waiting_for_room()
                without_room = self._patiently(without_room)
                if any(without_room.values()):
                    cluster = await asyncio.get_running_loop().run_in_executor(self._threads, view)
                    free = amounts(cluster.free)
        except Exception as error:  # noqa: BLE001 - Ray's own tables: the rest of the view is worth having without them
            self._trouble("the cluster's room", error)
        pools = tuple(
            pool_view(figures, self._limits_text(name), without_room.get(name, ())) for name, figures in stats.items()
        )
        return RunView(self.record.run, time.time(), pools, free, tuple(self.resizes), self.settings.every_s)

    def _patiently(self, without_room: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return those of ``without_room`` that have been so for a while."""
        now = time.monotonic()
        self._roomless = {name: self._roomless.get(name, now) for names in without_room.values() for name in names}
        return {
            pool: [name for name in names if now - self._roomless[name] >= ROOM_GRACE_S]
            for pool, names in without_room.items()
        }

    def _limits_text(self, name: str) -> str:
        limits = self.limits[name]
        return f"{limits.min}…{limits.max}" if limits.enabled else "off"

    def _export(self, stats: Mapping[str, PoolStats]) -> None:
        if self._exporter is None:
            self._exporter = Exporter(self.record.run)
        for name, figures in stats.items():
            self._exporter.export(figures, self.pools[name].take_timings())

    async def _line(self, points: Mapping[str, PoolPoint], now: float) -> None:
        """Append a line to ``pools.jsonl`` when it is time."""
        every = self.settings.trace_every_s
        if not every or now < self._next_line:
            return
        self._next_line = now + every
        line = {"time": round(time.time(), 3), "pools": {name: dataclasses.asdict(p) for name, p in points.items()}}
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._append, json.dumps(line) + "\n")
        except OSError as error:
            self._trouble(TRACE_FILE, error)

    def _append(self, line: str) -> None:
        with (self.out / TRACE_FILE).open("a", encoding="utf-8") as file:
            file.write(line)

    # --- what is changed

    async def _autoscale(self, points: Mapping[str, PoolPoint]) -> None:
        for name, autoscaler in self.autoscalers.items():
            wanted = autoscaler.see(points[name])
            if wanted != points[name].target:
                await self._resize(name, wanted, "autoscaler")

    async def _resize(self, name: str, workers: int, by: str, leaving: str = "") -> None:
        pool = self.pools[name]
        before = pool.stats().target
        if workers == before:
            return
        await pool.resize(workers, leaving=leaving)
        self.resizes.append(Resize(round(time.time(), 3), name, before, workers, by))
        log.info("pool %s: %d → %d workers (%s)", name, before, workers, by)

    async def _obey(self, request: str) -> str:
        """Do what a request of ``vans scale`` asks, all of it or nothing; return the answer."""
        sizes: dict[str, int] = json.loads(request)
        unknown = [name for name in sizes if name not in self.pools]
        wrong = [f"{name}={size}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]
        if unknown or wrong:
            return json.dumps({"error": refusal(unknown, wrong, list(self.pools))})
        before = {name: self.pools[name].stats().target for name in sizes}
        for name, size in sizes.items():
            await self._resize(name, size, "vans scale")
        return json.dumps({"before": before, "after": sizes})

    # --- the board

    async def _exchange(self, seen: RunView) -> None:
        """Show ``seen`` on the board, deliver answers, and obey the requests that arrive within ``every_s``."""
        if self._board is None and not await self._open_board():
            await asyncio.sleep(self.settings.every_s)
            return
        board, text, answers, wait_s = self._board, seen.to_json(), self._answers, self.settings.every_s
        try:
            requests = await ask(
                lambda: board.exchange.remote(text, answers, wait_s),
                timeout_s=wait_s + BOARD_TIMEOUT_S,
                sender=self._threads,
                who=f"the board {self.record.board}",
                what="exchange()",
            )
        except (WorkerTimeoutError, WorkerGone, WorkerUnreachable, WorkerRaised) as error:
            self._drop_board()
            self._trouble("the board", error, "It is replaced" if self._boards < MOST_BOARDS else "It is given up")
            return
        self._answers = {}
        for number, request in requests.items():
            try:
                self._answers[number] = await self._obey(request)
            except Exception as error:  # noqa: BLE001 - whoever asked is told; the run goes on
                self._answers[number] = json.dumps({"error": f"the run could not do it: {error}"})

    async def _open_board(self) -> bool:
        if self._boards >= MOST_BOARDS:
            return False
        self._boards += 1
        try:
            self._board = await asyncio.get_running_loop().run_in_executor(self._threads, open_board, self.record.board)
        except Exception as error:  # noqa: BLE001 - the run goes on without
            self._trouble("the board", error, "Another is tried")
            return False
        return True

    def _drop_board(self) -> None:
        import ray

        board, self._board = self._board, None
        self._answers = {}  # the next board numbers its requests anew
        if board is not None and ray.is_initialized():
            ray.kill(board, no_restart=True)

    def _trouble(self, what: str, error: Exception, then: str = "") -> None:
        """Log the first failure of each kind; the run is not concerned."""
        if what + then not in self._troubles:
            self._troubles.add(what + then)
            log.warning("monitor: %s failed: %s. %sTraining goes on.", what, error, f"{then}. " if then else "")


def refusal(unknown: Sequence[str], wrong: Sequence[str], pools: Sequence[str]) -> str:
    """Return why sizes were refused."""
    if unknown:
        return f"no pool {', '.join(unknown)}; the run's pools are {', '.join(pools)}"
    return f"{', '.join(wrong)}: a pool has at least 1 worker"


def _write(record: RunRecord, out: Path) -> None:
    try:
        record.write(out)
    except OSError as error:
        log.warning("monitor: control.json could not be written to %s: %s. Training goes on.", out, error)


def _write_end(record: RunRecord, out: Path) -> None:
    """Say that the run has ended, unless the folder is another process's by now: one that resumed it."""
    try:
        mine = RunRecord.read(out).board == record.board
    except (OSError, ValueError, TypeError):  # gone, or damaged
        mine = True
    if mine:
        _write(dataclasses.replace(record, state="ended", ended=utc_now()), out)
