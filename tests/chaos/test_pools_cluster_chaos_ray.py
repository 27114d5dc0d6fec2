"""A lost node and a full object store, each on a Ray cluster of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.failures import Ok
from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from cluster.resources import Ask, PlacementPlan, place
from tests.chaos.pool_harness import MIB, Squarer, Traffic, gone, make_pool, run, until, whole

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_alone")]


def test_a_lost_node_leaves_the_pool_smaller_until_it_comes_back() -> None:
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 80 * MIB}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
    nodes = [cluster.add_node(num_cpus=2, **store) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    cluster.wait_for_nodes()

    async def story() -> None:
        # Four bundles of one CPU on two nodes of two; the head has one more. Of two lost bundles Ray moves both or none.
        room = await asyncio.to_thread(place, PlacementPlan((Ask("sq", 4, 1.0),)), 60)
        actor = ray.remote(Squarer)
        with room:
            pool = WorkerPool(
                "sq",
                lambda name: actor.options(**room.options("sq", name), max_restarts=0).remote(name),
                PoolSection(workers=4, max_batch=2, start_timeout_s=60.0, request_timeout_s=20.0, max_retries=8),
                reconsider=partial(room.reconsider, "sq"),
            )
            async with pool:
                traffic = Traffic(pool)
                lanes = [asyncio.create_task(traffic.flow(lane, 0.02)) for lane in range(12)]
                await traffic.publish()
                lost = nodes[0]
                on_it = [a for a in await node_pids(pool) if a[1] == lost.node_id]
                assert len(on_it) == 2
                began = time.monotonic()
                await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)
                before = traffic.answered
                await until(lambda: traffic.answered > before + 50, 30)  # goes on with what is left
                await until(lambda: all(gone(pid) for pid, _ in on_it), 30)  # nothing lingers
                await until(lambda: pool.stats().ready == 2, 60)
                await until(lambda: pool.stats().ready == 3, 120)  # one found room on the head
                print(f"a worker of the lost node served elsewhere after {time.monotonic() - began:.0f} s")
                await asyncio.sleep(2.0)
                assert pool.stats().ready == 3
                began = time.monotonic()
                cluster.add_node(num_cpus=2, **store)  # it sets signal handlers, which only the main thread may
                await until(lambda: whole(pool), 120)
                print(f"whole again {time.monotonic() - began:.0f} s after the node came back")
                await traffic.publish()
                traffic.on = False
                await asyncio.gather(*lanes)
                stats = pool.stats()
                assert traffic.submitted == traffic.answered == stats.done and stats.target == stats.ready == 4
                print(f"{stats.done} requests, {stats.retries} retries, {stats.restarts} restarts")

    try:
        run(story, 400)
    finally:
        ray.shutdown()
        cluster.shutdown()


async def node_pids(pool: WorkerPool) -> list[tuple[int, str]]:
    """Return (pid, node id) of the pool's workers."""
    found = await asyncio.to_thread(_actors_by_pid)
    return [(info.pid, found[info.pid]) for info in pool.infos().values()]


def _actors_by_pid() -> dict[int, str]:
    from ray._private.state import actors

    return {a["Pid"]: a["Address"]["NodeID"] for a in actors().values() if a["State"] == "ALIVE"}


# --- memory


class Mirror(Squarer):
    """Answers an array with its mirror image; its weights are an array, and what it serves is their sum."""

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        self.bias = 0.0 if payload is None else float(ray.get(payload[0]).sum())
        self.version = version
        return version

    def process(self, requests: list[Any]) -> list[Any]:
        return [Ok((array[::-1].copy(), self.bias)) for array in requests]


@pytest.fixture
def small_store(ray_alone: None) -> Iterator[Path]:
    """Ray with an object store of 80 MiB; gives the session's folder."""
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=80 * MIB,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield Path(ray._private.worker._global_node.get_session_dir_path())
    ray.shutdown()


def spilled(session: Path) -> int:
    return sum(f.stat().st_size for f in session.glob("ray_spilled_objects*/*") if f.is_file())


def test_more_data_than_the_object_store_holds_is_slow_and_not_lost(small_store: Path) -> None:
    arrays = [np.random.default_rng(i).integers(0, 256, 8 * MIB, dtype=np.uint8) for i in range(40)]  # 4 stores full
    most = 0

    async def story() -> None:
        nonlocal most
        pool = make_pool("mirror", Mirror, spec={"max_batch": 2, "probe_every_s": 60.0}, actor={"num_cpus": 1})
        async with pool:
            answers = await asyncio.gather(*(pool.submit(array) for array in arrays))  # all kept: pinned in the store
            for (answer, _), array in zip(answers, arrays, strict=True):
                assert np.array_equal(answer, array[::-1])
            kept = []  # published weights that somebody still holds
            for version in (1, 2, 3):
                kept.append(ray.put(np.full(40 * MIB, version, np.uint8)))
                await pool.set_weights(version, kept[-1:])
            most = spilled(small_store)
            assert most >= 40 * MIB
            weights = np.ones(120 * MIB, np.uint8)  # one object larger than the store
            await pool.set_weights(4, [ray.put(weights)])
            assert {bias for _, bias in await asyncio.gather(*(pool.submit(a) for a in arrays[:4]))} == {120.0 * MIB}
            stats = pool.stats()
            assert stats.restarts == stats.retries == 0 and stats.done == len(arrays) + 4

    run(story, 300)
    print(f"{len(arrays) * 16} MiB in and out of a store of 80 MiB; {most >> 20} MiB lay spilled")
    ray.shutdown()
    assert spilled(small_store) == 0
