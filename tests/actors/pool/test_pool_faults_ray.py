"""Stopped processes and deaths at bad moments, in a pool that has exactly the room that it needs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.pool.pool import WorkerPool
from cluster.resources import Ask, Placement, PlacementPlan, place
from tests.actors.pool.limits import limits
from tests.actors.pool.test_pool_ray import Squarer, ready, run, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


class Slow(Squarer):
    """Takes its time to load weights, and says when it begins."""

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        self._log(f"loads {version}")
        time.sleep(1.0 if version else 0.0)
        return super().load_weights(version, payload)


def placed_pool(room: Placement, folder: Path, cls: type = Squarer, **changes: Any) -> WorkerPool:
    spec = {"workers": 2, "max_batch": 1, "start_timeout_s": 60.0, "request_timeout_s": 2.0} | changes
    actor = ray.remote(cls)

    def make(name: str) -> Any:
        return actor.options(**room.options("sq", name), max_restarts=0).remote(name, str(folder))

    return WorkerPool("sq", make, *limits(**spec), reconsider=partial(room.reconsider, "sq"))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_stopped_worker_makes_room_for_its_replacement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        # Its bundle holds one worker, so a process that were only forgotten would keep its replacement out.
        room = await asyncio.to_thread(place, PlacementPlan((Ask("sq", 2, 1.0),)), 30)
        with room:
            async with placed_pool(room, tmp_path, probe_every_s=0.5, probe_timeout_s=3.0) as pool:
                pids = await pool.call_all("pid")
                work = asyncio.gather(*(pool.submit((n, 0.2, "")) for n in range(6)))
                await asyncio.sleep(0.3)
                os.kill(pids["sq-0"], signal.SIGSTOP)  # in the middle of a request
                os.kill(pids["sq-1"], signal.SIGSTOP)
                assert [value for value, _, _ in await work] == [n * n for n in range(6)]
                await until(lambda: ready(pool) == ["sq-0.2", "sq-1.2"])
                await until(lambda: gone(pids["sq-0"]) and gone(pids["sq-1"]))
                assert f"pid {pids['sq-0']}) did not answer process() within 2 s" in caplog.text
                idle = pool.infos()["sq-0.2"].pid
                os.kill(idle, signal.SIGSTOP)
                await until(lambda: ready(pool) == ["sq-0.3", "sq-1.2"])
                await until(lambda: gone(idle))
                assert f"pid {idle}) did not answer ping() within 3 s" in caplog.text

    run(story)


def test_a_worker_killed_while_it_loads_serves_no_old_weights(tmp_path: Path) -> None:
    async def story() -> None:
        room = await asyncio.to_thread(place, PlacementPlan((Ask("sq", 2, 1.0),)), 30)
        with room:
            async with placed_pool(room, tmp_path, Slow, request_timeout_s=20.0) as pool:
                pids = await pool.call_all("pid")
                publishing = asyncio.create_task(pool.set_weights(3, [ray.put(0.5)]))
                await until(lambda: "loads 3" in (tmp_path / "sq-0").read_text())
                os.kill(pids["sq-0"], signal.SIGKILL)
                answers = await asyncio.gather(*(pool.submit((n, 0.01, "")) for n in range(40)))
                assert [answer[:2] for answer in answers] == [(n * n + 0.5, 3) for n in range(40)]
                await publishing
                await until(lambda: ready(pool) == ["sq-0.2", "sq-1"])
                assert "process" not in (tmp_path / "sq-0").read_text()  # died before it served anything
                await asyncio.gather(*(pool.submit((n, 0.05, "")) for n in range(8)))
                replacement = (tmp_path / "sq-0.2").read_text().splitlines()
                assert replacement[:3] == ["setup", "loads 3", "load 3"] and set(replacement[3:]) == {"process 3"}

    run(story)
