"""A pool whose only worker was on a node that died works in another pool's place, on a real cluster of two logical nodes."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from actors.pool import pool as pool_module
from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from cluster.resources import Ask, PlacementPlan, place
from pipeline.config.machinery import ControlSection
from pipeline.control import room as room_module
from pipeline.control.monitor import supervised
from pipeline.control.record import new_record
from tests.chaos.pool_harness import MIB, Squarer, run, until, whole
from tests.chaos.test_pools_cluster_chaos_ray import node_pids

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_alone")]


def test_a_scorer_whose_node_died_works_in_a_samplers_place_until_there_is_a_node_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(room_module, "PATIENCE_S", 4.0)
    monkeypatch.setattr(room_module, "CALM_S", 4.0)
    monkeypatch.setattr(pool_module, "RECONSIDER_S", 2.0)
    store = {"object_store_memory": 80 * MIB}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **store})
    far = cluster.add_node(num_cpus=1, **store)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    cluster.wait_for_nodes()
    # The samplers fill the head, so the scorer has its bundle on the other node, and there is no room beside.
    plan = PlacementPlan((Ask("vdm", 2, 1.0, strategy="STRICT_PACK"), Ask("reward", 1, 1.0)))

    async def story() -> None:
        reserved = await asyncio.to_thread(place, plan, 60)
        actor = ray.remote(Squarer)

        def pool_of(name: str, workers: int) -> WorkerPool:
            return WorkerPool(
                name,
                lambda worker: actor.options(**reserved.options(name, worker), max_restarts=0).remote(worker),
                PoolSection(workers=workers, max_batch=1, start_timeout_s=120.0, request_timeout_s=20.0, max_retries=8),
                reconsider=partial(reserved.reconsider, name),
            )

        answered = {"vdm": 0, "reward": 0}
        on = asyncio.Event()
        on.set()

        async def ask(pool: WorkerPool) -> None:
            while on.is_set():
                number = answered[pool.name]
                value, _ = await pool.submit((number, 0.02))
                assert value == number * number
                answered[pool.name] += 1

        with reserved:
            async with pool_of("vdm", 2) as vdm, pool_of("reward", 1) as reward:
                record = new_record("room", cluster.address)
                settings = ControlSection(every_s=0.5, trace_every_s=0)
                async with supervised([vdm, reward], record, tmp_path, settings, {}, reserved) as monitor:
                    lanes = [asyncio.create_task(ask(pool)) for pool in (vdm, reward)]
                    assert {node for _, node in await node_pids(reward)} == {far.node_id}
                    began = time.monotonic()
                    await asyncio.to_thread(cluster.remove_node, far, allow_graceful=False)
                    await until(lambda: reward.stats().ready == 0, 60)
                    await until(lambda: reward.stats().ready == 1, 120)
                    print(f"the scorer works in a sampler's place after {time.monotonic() - began:.0f} s")
                    assert {node for _, node in await node_pids(reward)} == {cluster.head_node.node_id}
                    before = dict(answered)
                    await until(lambda: all(answered[name] > before[name] + 20 for name in answered), 60)
                    assert vdm.stats().target == vdm.stats().ready == 1
                    began = time.monotonic()
                    back = cluster.add_node(num_cpus=1, **store)
                    await until(lambda: whole(vdm) and vdm.stats().target == 2 and whole(reward), 180)
                    print(f"both are as before {time.monotonic() - began:.0f} s after there was a node again")
                    assert {node for _, node in await node_pids(reward)} == {back.node_id}
                    await asyncio.sleep(10.0)  # and stay so
                    on.clear()
                    await asyncio.gather(*lanes)
                    changes = [(change.pool, change.before, change.after) for change in monitor.resizes]
                    assert changes == [("vdm", 2, 1), ("reward", 1, 2), ("reward", 2, 1), ("vdm", 1, 2)]
                print(f"{answered} answered, {reward.stats().restarts} restarts of the scorer")

    try:
        run(story, 500)
    finally:
        ray.shutdown()
        cluster.shutdown()
