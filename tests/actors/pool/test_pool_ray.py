"""The pool on real Ray actors: killed, stopped, resized, and given new weights while it serves."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.failures import BadSampleError, InfrastructureError, attempt
from actors.pool.errors import PoolFailed, SampleFailed, WorkerBug
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo, worker_info
from actors.pool.state import S
from cluster.errors import CheckpointError
from cluster.names import slot_of
from tests.actors.pool.limits import limits

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


class Squarer:
    """A small real worker: answers ``(number, seconds, what)`` with the number squared, its version and its name."""

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.folder = name, Path(folder)
        self.version: int | None = None
        self.bias = 0.0

    def setup(self) -> WorkerInfo:
        self._log("setup")
        return worker_info(self.name, "cpu", "hash")

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        self.bias = 0.0 if payload is None else float(ray.get(payload[0]))
        self.version = version
        self._log(f"load {version}")
        return version

    def process(self, requests: list[Any]) -> list[Any]:
        self._log(f"process {self.version}")
        return [attempt(lambda request=request: self._answer(*request)) for request in requests]

    def _answer(self, number: int, seconds: float, what: str) -> tuple[float, int | None, str]:
        time.sleep(seconds)
        if what == "data":
            raise BadSampleError(f"{number} cannot be squared")
        if what == "bug":
            raise KeyError("no such thing")
        if what == "machine" and slot_of(self.name) == 0:
            raise InfrastructureError("device lost")
        if what == "die":
            os._exit(1)
        return number * number + self.bias, self.version, self.name

    def weights_hash(self) -> str:
        return f"hash@{self.version}"

    def ping(self) -> str:
        return "pong"

    def pid(self) -> int:
        return os.getpid()

    def shutdown(self) -> None:
        self._log("shutdown")

    def _log(self, text: str) -> None:
        with (self.folder / self.name).open("a") as file:
            file.write(text + "\n")


class Broken(Squarer):
    def setup(self) -> WorkerInfo:
        raise ZeroDivisionError("setup divides by zero")


class NoModel(Squarer):
    def setup(self) -> WorkerInfo:
        raise CheckpointError("model folder 'nowhere' does not exist")


def make_pool(folder: Path, cls: type = Squarer, cpus: float = 0.5, **changes: Any) -> WorkerPool:
    spec = {
        "workers": 2,
        "max_batch": 4,
        "start_timeout_s": 60.0,
        "request_timeout_s": 30.0,
        "probe_every_s": 1.0,
    } | changes
    actor = ray.remote(cls)

    def make(name: str) -> Any:
        return actor.options(num_cpus=cpus, max_restarts=0).remote(name, str(folder))

    return WorkerPool("sq", make, *limits(**spec))


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 120))


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


def ready(pool: WorkerPool) -> list[str]:
    return [worker.name for worker in pool.stats().workers if worker.state is S.READY]


def test_killed_worker_loses_no_request_and_its_replacement_loads_the_current_weights(tmp_path: Path) -> None:
    async def story() -> None:
        async with make_pool(tmp_path) as pool:
            await pool.set_weights(7, [ray.put(0.5)])
            pids = await pool.call_all("pid")
            assert set(pids) == {"sq-0", "sq-1"}
            work = asyncio.gather(*(pool.submit((n, 0.03, "")) for n in range(60)))
            await asyncio.sleep(0.3)
            os.kill(pids["sq-0"], signal.SIGKILL)
            answers = await work
            assert [value for value, _, _ in answers] == [n * n + 0.5 for n in range(60)]
            assert {version for _, version, _ in answers} == {7}
            await until(lambda: len(ready(pool)) == 2)
            assert ready(pool) == ["sq-0.2", "sq-1"]
            stats = pool.stats()
            assert stats.restarts == 1 and stats.retries >= 1 and stats.done == 60 and stats.queue_len == 0
            await asyncio.gather(*(pool.submit((n, 0.02, "")) for n in range(16)))
            steps = (tmp_path / "sq-0.2").read_text().splitlines()
            assert steps[:2] == ["setup", "load 7"]  # weights came before the first request
            assert set(steps[2:]) == {"process 7"}
            assert await pool.call_all("weights_hash") == {"sq-0.2": "hash@7", "sq-1": "hash@7"}

            # An idle worker's death is noticed too, by a probe.
            os.kill(pids["sq-1"], signal.SIGKILL)
            await until(lambda: ready(pool) == ["sq-0.2", "sq-1.2"])

    run(story)


def test_hung_worker_is_named_killed_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with make_pool(tmp_path, request_timeout_s=3.0, max_batch=1) as pool:
            pids = await pool.call_all("pid")
            work = asyncio.gather(*(pool.submit((n, 0.2, "")) for n in range(6)))
            await asyncio.sleep(0.3)
            os.kill(pids["sq-1"], signal.SIGSTOP)
            assert [value for value, _, _ in await work] == [n * n for n in range(6)]
            await until(lambda: ready(pool) == ["sq-0", "sq-1.2"])
            node = pool.infos()["sq-0"].node
            assert (
                f"worker sq-1 of pool sq (on node {node}, pid {pids['sq-1']}) did not answer process() within 3 s"
                in caplog.text
            )

    run(story)


def test_new_weights_wait_for_calls_under_way_and_bind_all_later_requests(tmp_path: Path) -> None:
    async def story() -> None:
        async with make_pool(tmp_path, max_batch=1) as pool:
            before = [asyncio.create_task(pool.submit((n, 0.4, ""))) for n in range(2)]
            await asyncio.sleep(0.2)
            weights = asyncio.create_task(pool.set_weights(1, [ray.put(10.0)]))
            await asyncio.sleep(0)
            after = [asyncio.create_task(pool.submit((n, 0.0, ""))) for n in range(8)]
            assert [(value, version) for value, version, _ in await asyncio.gather(*before)] == [(0, 0), (1, 0)]
            assert [(value, version) for value, version, _ in await asyncio.gather(*after)] == [
                (n * n + 10, 1) for n in range(8)
            ]
            await weights
            await pool.set_weights(2, None)
            assert (await pool.submit((3, 0.0, "")))[:2] == (9, 2)

    run(story)


def test_resize_while_requests_run(tmp_path: Path) -> None:
    async def story() -> None:
        async with make_pool(tmp_path, workers=1, max_batch=1) as pool:
            work = asyncio.gather(*(pool.submit((n, 0.05, "")) for n in range(100)))
            await pool.resize(3, wait=True)
            assert ready(pool) == ["sq-0", "sq-1", "sq-2"]
            await asyncio.sleep(0.3)
            await pool.resize(1)
            answers = await work
            assert [value for value, _, _ in answers] == [n * n for n in range(100)]
            assert {name for _, _, name in answers} == {"sq-0", "sq-1", "sq-2"}
            await until(lambda: len(pool.stats().workers) == 1)
            await until(lambda: "shutdown" in (tmp_path / "sq-2").read_text())
            assert pool.stats().retries == 0 and pool.stats().restarts == 0  # shrinking drains, it does not kill

    run(story)


def test_growing_beyond_the_cluster_waits_without_stopping_the_rest(tmp_path: Path) -> None:
    async def story() -> None:
        async with make_pool(tmp_path, workers=1, cpus=3.0, start_timeout_s=20.0) as pool:
            await pool.resize(5)
            await until(lambda: len(ready(pool)) == 2)  # 8 slots hold two of them
            assert (await pool.submit((4, 0.0, "")))[0] == 16
            await pool.resize(2)
            await until(lambda: len(pool.stats().workers) == 2)
            assert pool.stats().restarts == 0

    run(story)


def test_failures_by_class(tmp_path: Path) -> None:
    async def story() -> None:
        async with make_pool(tmp_path, max_retries=2, max_strikes=50) as pool:
            with pytest.raises(SampleFailed, match="5 cannot be squared"):
                await pool.submit((5, 0.0, "data"))
            with pytest.raises(WorkerBug, match="no such thing") as bug:
                await pool.submit((5, 0.0, "bug"))
            assert "_answer" in bug.value.worker_traceback
            for n in range(4):  # fails on the first worker, succeeds on the other
                assert (await pool.submit((n, 0.0, "machine")))[2] == "sq-1"
            neighbour = asyncio.create_task(pool.submit((6, 0.0, "")))
            with pytest.raises(PoolFailed, match="failed 3 times"):
                await pool.submit((5, 0.0, "die"))  # kills whoever takes it
            assert (await neighbour)[0] == 36
            assert pool.stats().failures["data"] == 1 and pool.stats().failures["bug"] == 1

    run(story)


def test_bounds_and_broken_workers_end_in_a_clear_error(tmp_path: Path) -> None:
    async def story() -> None:
        pool = make_pool(tmp_path, max_restarts=1, max_retries=9)
        await pool.start()
        with pytest.raises(PoolFailed, match=r"(?s)max_restarts=1.*sq-"):
            await pool.submit((5, 0.0, "die"))
        with pytest.raises(PoolFailed):
            await pool.submit((5, 0.0, ""))
        await pool.close()
        with pytest.raises(WorkerBug, match="divides by zero"):
            await make_pool(tmp_path, Broken, workers=1).start()
        with pytest.raises(PoolFailed, match="model folder 'nowhere' does not exist"):
            await make_pool(tmp_path, NoModel, workers=1).start()
        began = time.monotonic()
        homeless = make_pool(tmp_path, cpus=1000.0, start_timeout_s=1.0)
        with pytest.raises(PoolFailed, match="not been started"):
            await homeless.submit((1, 0.0, ""))
        with pytest.raises(PoolFailed, match="no worker could be placed"):
            await homeless.start()
        assert time.monotonic() - began < 5

    run(story)


class Sleeper(Squarer):
    """Notes when it rests; like a real worker it wakes when it is asked for something."""

    def rest(self) -> None:
        self._log("rest")


def test_a_resting_pool_holds_back_until_it_is_woken(tmp_path: Path) -> None:
    async def story() -> None:
        async with make_pool(tmp_path, Sleeper) as pool:
            slow = asyncio.create_task(pool.submit((2, 0.3, "")))
            await asyncio.sleep(0.1)
            await pool.rest()
            assert slow.done() and (await slow)[0] == 4  # what was under way came first
            assert (
                all((tmp_path / name).read_text().splitlines()[-1] == "rest" for name in pool.infos())
                and len(pool.infos()) == 2
            )
            waiting = asyncio.create_task(pool.submit((3, 0.0, "")))
            setting = asyncio.create_task(pool.set_weights(1, [ray.put(0.5)]))
            victim, info = min(pool.infos().items())
            os.kill(info.pid, signal.SIGKILL)
            await until(lambda: any(w.state is S.RESTARTING for w in pool.stats().workers))  # a ping has found out
            await asyncio.sleep(1.0)
            assert not waiting.done() and not setting.done()
            assert {p.name for p in tmp_path.iterdir()} == {"sq-0", "sq-1"}  # no new process meanwhile
            pool.wake()
            await setting
            assert (await waiting)[:2] == (9.5, 1)
            await until(lambda: pool.stats().ready == 2)
            assert victim not in pool.infos()

    run(story)
