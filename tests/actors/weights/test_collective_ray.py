"""Full weights from two learner ranks by gloo broadcast into a real pool of artists: exact, and elastic."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.learner.group import LearnerGroup, LearnerSpec
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.pool.pool import WorkerPool
from actors.records import VdmExperience
from actors.vdm.worker import VdmWorker
from actors.weights.broadcast import BroadcastSpec, Offer
from tests.actors.learner.test_policies_ray import vdm_items
from tests.actors.pool.limits import limits

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]
SPEC = BroadcastSpec(join_timeout_s=3.0, transfer_timeout_s=30.0, bucket_bytes=1 << 18)  # a dozen messages


class Story:
    """A learner group and the pool that it publishes to, in one event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.items: list[VdmExperience] = vdm_items(folder)  # type: ignore[assignment]
        self.local = VdmWorker("local", self.folder)
        self.local.setup()
        self.learner = LearnerGroup(
            LearnerSpec(
                kind="vdm",
                model_path=self.folder,
                settings=LearnerSection(ranks=2, cpus=0.25, micro_batch=2),
                learning=GrpoSection(clip_low=1e-3, clip_high=1e-3),
                optim=OptimSection(lr=1e-3),
                policy_kwargs={"components": ("transformer", "vae_encoder", "text_encoder")},
                broadcast=SPEC,
            )
        )
        actor = ray.remote(VdmWorker)
        self.pool = WorkerPool(
            "vdm",
            lambda name: actor.options(num_cpus=0.25, max_concurrency=2).remote(name, self.folder),
            *limits(workers=2, start_timeout_s=120.0, probe_every_s=2.0),
        )

    async def start(self) -> None:
        await asyncio.gather(self.learner.start(), self.pool.start())

    async def close(self) -> None:
        await asyncio.gather(self.learner.close(), self.pool.close())

    async def publish(self, receivers: int | None = None) -> list[Any]:
        await self.learner.update(self.items)
        return await self.learner.publish(receivers=self.pool.receivers() if receivers is None else receivers)

    async def served(self, payload: list[Any]) -> dict[str, str]:
        """Return how each worker got its weights, after making sure that all hold exactly those of the object store."""
        self.local.load_weights(self.learner.version, payload[:1])
        hashes = await self.pool.call_all("weights_hash")
        assert set(hashes.values()) == {self.local.weights_hash()}
        return await self.pool.call_all("arrival")


@pytest.fixture(scope="module")
def story(tiny_vdm_dir: Path, ray_local: None) -> Iterator[tuple[Story, asyncio.AbstractEventLoop]]:
    loop = asyncio.new_event_loop()
    story = Story(tiny_vdm_dir)
    loop.run_until_complete(story.start())
    yield story, loop
    loop.run_until_complete(story.close())
    loop.close()


def test_all_workers_receive_the_broadcast_bit_for_bit(story: tuple[Story, asyncio.AbstractEventLoop]) -> None:
    here, loop = story

    async def body() -> None:
        for _ in range(2):
            payload = await here.publish()
            assert isinstance(payload[1], Offer) and payload[1].backend == "gloo"
            await here.pool.set_weights(here.learner.version, payload)
            assert set((await here.served(payload)).values()) == {"broadcast"}
        assert len(await here.learner.publish()) == 1  # nobody is expected: no offer

    loop.run_until_complete(body())


def test_a_worker_that_comes_later_pulls_the_same_version(story: tuple[Story, asyncio.AbstractEventLoop]) -> None:
    here, loop = story

    async def body() -> None:
        payload = await here.publish()
        await here.pool.set_weights(here.learner.version, payload)
        await here.pool.resize(3, wait=True)
        arrivals = await here.served(payload)
        assert len(arrivals) == 3 and sorted(arrivals.values()) == ["broadcast", "broadcast", "object store"]
        payload = await here.publish()  # from the next one on it takes part
        await here.pool.set_weights(here.learner.version, payload)
        assert sorted((await here.served(payload)).values()) == ["broadcast"] * 3

    loop.run_until_complete(body())


def test_a_worker_killed_during_a_publication_comes_back_with_it(
    story: tuple[Story, asyncio.AbstractEventLoop],
) -> None:
    here, loop = story

    async def body() -> None:
        payload = await here.publish()
        setting = asyncio.create_task(here.pool.set_weights(here.learner.version, payload))
        victim = min(here.pool.infos())
        await asyncio.sleep(0.03)
        os.kill(here.pool.infos()[victim].pid, signal.SIGKILL)
        await asyncio.wait_for(setting, 60)
        while here.pool.stats().ready < here.pool.stats().target:
            await asyncio.sleep(0.1)
        arrivals = await here.served(payload)
        assert victim not in arrivals and len(arrivals) == here.pool.stats().target
        assert "object store" in arrivals.values()  # the new process came after the broadcast
        assert here.pool.stats().restarts == 1

    loop.run_until_complete(asyncio.wait_for(body(), 200))


def test_a_worker_that_hangs_holds_up_the_others_for_the_join_timeout_only(
    story: tuple[Story, asyncio.AbstractEventLoop],
) -> None:
    here, loop = story

    async def body() -> None:
        payload = await here.publish()
        name, info = min(here.pool.infos().items())
        os.kill(info.pid, signal.SIGSTOP)
        try:
            started = loop.time()
            setting = asyncio.create_task(here.pool.set_weights(here.learner.version, payload))
            while (
                sum(w.version == here.learner.version for w in here.pool.stats().workers) < here.pool.stats().target - 1
            ):
                await asyncio.sleep(0.05)
                assert loop.time() - started < SPEC.join_timeout_s + 15
            assert not setting.done()
        finally:
            os.kill(info.pid, signal.SIGCONT)
        await asyncio.wait_for(setting, 60)
        arrivals = await here.served(payload)
        assert arrivals.pop(name) == "object store" and set(arrivals.values()) == {"broadcast"}

    loop.run_until_complete(asyncio.wait_for(body(), 200))
