"""Faults that are really done to pools: the real workers killed, their requests spoilt, and a long random mixture."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest

from actors.policy.lora import adapter_config
from actors.policy.settings import LoraSection
from actors.pool.errors import SampleFailed
from actors.pool.pool import WorkerPool
from actors.pool.protocol import WorkerInfo
from actors.records import CompletionRequest, RenderRequest, ScoreRequest, derive_seed
from actors.scoring.worker import RewardWorker
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.worker import VdmWorker
from actors.vlm.settings import VlmPoolSection
from actors.vlm.worker import VlmWorker
from actors.weights.transport import pack, send
from pipeline.data.toy import make_sample
from pipeline.fleet.models import resolve_model
from tests.chaos.pool_harness import Squarer, Traffic, gone, make_pool, run, until, whole

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]


async def busy(pool: WorkerPool) -> WorkerInfo:
    """Return a worker that has a call under way."""
    names: list[str] = []

    def found() -> bool:
        names[:] = [w.name for w in pool.stats().workers if w.inflight]
        return bool(names)

    await until(found, 60)
    return pool.infos()[names[0]]


async def killed_at_work_and_at_rest(pool: WorkerPool, requests: list[Any], same: Callable[[Any, Any], bool]) -> None:
    """The story of every pool: ask undisturbed, ask while a worker is killed, kill an idle one, ask again."""
    async with pool:
        ask = partial(asyncio.gather, return_exceptions=False)
        expected = await ask(*(pool.submit(r) for r in requests))
        work = asyncio.ensure_future(ask(*(pool.submit(r) for r in requests)))
        victim = await busy(pool)
        os.kill(victim.pid, signal.SIGKILL)
        answers = await work
        assert pool.stats().retries >= 1, "the worker was killed between its calls"
        assert all(same(a, b) for a, b in zip(answers, expected, strict=True))
        await until(lambda: victim.name not in pool.infos() and whole(pool))
        idle = next(iter(pool.infos().values()))
        os.kill(idle.pid, signal.SIGKILL)
        await until(lambda: idle.name not in pool.infos() and whole(pool))
        again = await ask(*(pool.submit(r) for r in requests))
        assert all(same(a, b) for a, b in zip(again, expected, strict=True))
        stats = pool.stats()
        assert stats.restarts == 2 and stats.done == 3 * len(requests) and stats.queue_len == stats.inflight == 0
        assert len({info.model_hash for info in pool.infos().values()}) == 1


def same_tokens(a: Any, b: Any) -> bool:
    return [c.token_ids.tolist() for c in a] == [c.token_ids.tolist() for c in b]


def same_clip(a: Any, b: Any) -> bool:
    # Batches of other sizes round otherwise.
    return (a.sample_id, a.index) == (b.sample_id, b.index) and np.abs(a.frames.astype(int) - b.frames).max() <= 1


def same_scores(a: Any, b: Any) -> bool:
    return a.values.keys() == b.values.keys() and all(abs(a.values[k] - b.values[k]) < 1e-5 for k in a.values)


def completions(count: int) -> list[CompletionRequest]:
    samples = [make_sample(i, "test") for i in range(count)]
    return [CompletionRequest(s.id, s.asked, n=4, seed=derive_seed(i), max_tokens=48) for i, s in enumerate(samples)]


def renders(count: int, **changes: Any) -> list[RenderRequest]:
    s = make_sample(0, "test")
    fields = {"num_frames": 9, "steps": 6, "guidance": 1.0} | changes
    return [
        RenderRequest(s.id, i, s.caption, s.input_frames[[0, -1]], noise_seed=derive_seed(i), **fields)
        for i in range(count)
    ]


def scores(count: int) -> list[ScoreRequest]:
    names = ("format", "rouge_l", "clip_v", "clip_score")
    found = []
    for i in range(count):
        s = make_sample(i, "test")
        text, frames, last = s.answer_text, s.target_frames, s.input_frames[-1]
        found.append(ScoreRequest(s.id, i, names, text, s.caption, s.caption, frames, last, np.roll(frames, i, axis=2)))
    return found


def vlm_pool(**options: Any) -> WorkerPool:
    spec = {"max_batch": 1, "max_inflight": 64} | options.pop("spec", {})
    actor = {"num_cpus": 1, "max_concurrency": 256}
    return make_pool(
        "vlm",
        VlmWorker,
        str(resolve_model("tiny", "vlm")),
        spec=spec,
        actor=actor,
        settings=VlmPoolSection(kv_cache_mib=64),
        **options,
    )


def vdm_pool() -> WorkerPool:
    actor = {"num_cpus": 0.5, "max_concurrency": 2}
    return make_pool("vdm", VdmWorker, str(resolve_model("tiny", "vdm")), spec={"max_batch": 4}, actor=actor)


def reward_pool() -> WorkerPool:
    actor = {"num_cpus": 0.5, "max_concurrency": 2}
    names = ("format", "rouge_l", "clip_v", "clip_score")
    return make_pool(
        "reward", RewardWorker, str(resolve_model("tiny", "clip")), names, spec={"max_batch": 4}, actor=actor
    )


# --- the real workers, killed


@pytest.mark.usefixtures("ray_local")
def test_real_vdm_workers_killed_at_work_and_at_rest() -> None:
    run(lambda: killed_at_work_and_at_rest(vdm_pool(), renders(16), same_clip))


@pytest.mark.usefixtures("ray_local")
def test_real_reward_workers_killed_at_work_and_at_rest() -> None:
    run(lambda: killed_at_work_and_at_rest(reward_pool(), scores(48), same_scores))


@pytest.mark.vllm
@pytest.mark.usefixtures("ray_local")
def test_real_vlm_workers_killed_at_work_and_at_rest() -> None:
    run(lambda: killed_at_work_and_at_rest(vlm_pool(), completions(16), same_tokens))


@pytest.mark.usefixtures("ray_local")
def test_real_vdm_worker_killed_while_weights_are_loaded() -> None:
    async def story() -> None:
        path = resolve_model("tiny", "vdm")
        policy = VdmPolicy.load(path, lora=LoraSection(rank=4, alpha=8.0))
        tensors = {name: tensor + 0.05 for name, tensor in policy.adapter_state().items()}
        payload = send(pack(5, "lora", tensors, adapter_config(policy.module)))
        policy.load_adapter_state(tensors)
        requests = renders(8)
        async with vdm_pool() as pool:
            publishing = asyncio.create_task(pool.set_weights(5, payload))
            work = asyncio.gather(*(pool.submit(request) for request in requests))
            await asyncio.sleep(0)  # the load is sent
            victim = next(iter(pool.infos().values()))
            os.kill(victim.pid, signal.SIGKILL)
            clips = await work
            await publishing
            assert {clip.weights_version for clip in clips} == {5}
            expected = sample(policy, requests)
            assert all(same_clip(a, b) for a, b in zip(clips, expected, strict=True))
            await until(lambda: victim.name not in pool.infos() and whole(pool))
            assert {h.split(":")[1] for h in (await pool.call_all("weights_hash")).values()} == {"5"}

    run(story)


@pytest.mark.vllm
@pytest.mark.usefixtures("ray_local")
def test_a_dead_vllm_engine_is_replaced_and_a_dead_worker_leaves_none_behind() -> None:
    """vLLM in processes of its own, as on GPUs."""

    async def engine(pid: int) -> list[psutil.Process]:
        """vLLM's processes below ``pid``; a process's title can be read as another one for a moment."""
        found: dict[str, psutil.Process] = {}

        def seen() -> bool:
            for child in psutil.Process(pid).children(recursive=True):
                title = " ".join([child.name(), *child.cmdline()[:1]])
                if "VLLM::" in title:
                    found["core" if "EngineCore" in title else title] = child
            return "core" in found

        await until(seen, 30)
        return [found.pop("core"), *found.values()]

    async def story() -> None:
        async with vlm_pool(in_process=False, spec={"workers": 1}) as pool:
            requests = completions(4)
            expected = await asyncio.gather(*(pool.submit(r) for r in requests))
            first = pool.infos()["vlm-0"]
            (await engine(first.pid))[0].kill()  # the worker lives, and is of no use
            await until(lambda: "vlm-0.2" in pool.infos() and whole(pool))
            assert gone(first.pid)
            second = pool.infos()["vlm-0.2"]
            parts = await engine(second.pid)
            work = asyncio.gather(*(pool.submit(r) for r in requests))
            await asyncio.sleep(0.05)
            os.kill(second.pid, signal.SIGKILL)
            await until(lambda: all(gone(p.pid) for p in parts), 20)
            assert all(same_tokens(a, b) for a, b in zip(await work, expected, strict=True))

    run(story)


# --- bad requests


@pytest.mark.usefixtures("ray_local")
def test_bad_requests_leave_their_neighbours_in_real_pools_alone() -> None:
    async def refused(pool: WorkerPool, good: list[Any], bad: list[tuple[Any, str]]) -> None:
        async with pool:
            done = await asyncio.gather(
                *(pool.submit(r) for r in [*good, *(r for r, _ in bad)]), return_exceptions=True
            )
            assert not any(isinstance(answer, BaseException) for answer in done[: len(good)])
            for answer, (_, reason) in zip(done[len(good) :], bad, strict=True):
                assert isinstance(answer, SampleFailed) and reason in str(answer), answer
            stats = pool.stats()
            assert stats.failures["data"] == len(bad) and stats.retries == stats.restarts == 0

    async def story() -> None:
        one = renders(3)
        bad_frames = replace(one[0], reference_frames=np.zeros((2, 30, 34, 3), np.uint8))
        grey = replace(one[0], reference_frames=np.zeros((2, 32, 32), np.uint8))
        await refused(
            vdm_pool(),
            one,
            [(replace(one[0], caption="  "), "caption is empty"), (bad_frames, "height=30"), (grey, "(2, 32, 32)")],
        )
        judged = scores(3)
        odd = replace(judged[0], clip=np.zeros((9, 32, 32), np.uint8))
        empty = replace(judged[0], clip=np.zeros((0, 32, 32, 3), np.uint8))
        await refused(
            reward_pool(),
            judged,
            [(odd, "(9, 32, 32)"), (empty, "no picture"), (replace(judged[0], caption=""), "empty")],
        )

    run(story)


# --- everything at once


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("seed", [int(os.environ.get("VANS_CHAOS_SEED", "1"))])
def test_random_faults_for_a_minute(seed: int) -> None:
    dice = random.Random(seed)
    seconds = float(os.environ.get("VANS_CHAOS_SECONDS", "60"))

    async def story() -> None:
        limits = {
            "workers": 4,
            "max_batch": 4,
            "start_timeout_s": 20.0,
            "request_timeout_s": 3.0,
            "probe_timeout_s": 3.0,
            "max_retries": 50,
            "max_restarts": 1000,
        }
        async with make_pool("sq", Squarer, 0.05, spec=limits, actor={"num_cpus": 0.5}) as pool:
            traffic = Traffic(pool)
            lanes = [asyncio.create_task(traffic.flow(lane, 0.002)) for lane in range(40)]
            publishing: list[asyncio.Task[None]] = []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(dice.uniform(0.3, 1.5))
                fault = dice.choices(["kill", "stop", "resize", "weights"], [3, 2, 2, 4])[0]
                victims = sorted(pool.infos().items())
                if fault == "resize":
                    await pool.resize(dice.randint(2, 4))
                elif fault == "weights":
                    publishing.append(asyncio.create_task(traffic.publish()))
                    await asyncio.sleep(0)
                elif victims:
                    try:
                        os.kill(dice.choice(victims)[1].pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
                    except ProcessLookupError:
                        continue
                else:
                    continue
                traffic.faults[fault] += 1
                failed = [task for task in lanes if task.done()]
                assert not failed, failed[0].exception()
            await pool.resize(4)
            await asyncio.gather(*publishing)
            await until(lambda: whole(pool), 120)
            traffic.on = False
            await asyncio.gather(*lanes)
            stats = pool.stats()
            assert traffic.submitted == traffic.answered == stats.done and stats.queue_len == stats.inflight == 0
            assert set((await pool.call_all("weights_hash")).values()) == {f"hash@{traffic.version}"}
            assert all(traffic.faults[kind] for kind in ("kill", "stop", "resize", "weights"))
            faults = ", ".join(f"{count} {kind}" for kind, count in sorted(traffic.faults.items()))
            print(f"\nseed {seed}: {faults}; {stats.done} requests, {stats.retries} retries, {stats.restarts} restarts")

    run(story)
