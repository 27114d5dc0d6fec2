"""The server under load: fifty askers while a replica is killed, and its memory over five hundred answers. Both print p50 and p95."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from pipeline.config import load_config
from tests.pipeline.serve.serving import (
    ENDED,
    QUESTION,
    answered,
    ask,
    export_adapter,
    free_port,
    replica_pid,
    toy_clip,
)

pytest.importorskip("grpc_reflection", reason="the extra `serve` is not installed")
pytestmark = pytest.mark.chaos
ASKERS, ANSWERS, AT_ONCE = 50, 500, 10


@pytest.fixture(scope="module")
def address(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from pipeline.serve.app import served
    from pipeline.serve.exports import with_models

    overrides = [f"serve.port={free_port()}", "serve.vdm.replicas=2", "serve.limits.keep_s=5"]
    adapter = tmp_path_factory.mktemp("trained") / "vdm_adapter"
    export_adapter(adapter, "vdm", 0.5)
    began = load_config("toy", overrides)
    with served(with_models(began, None, str(adapter)), None, before=began) as address:
        yield address
    serve.shutdown()


async def asked(client: httpx.AsyncClient, number: int, steps: int) -> tuple[float, dict]:
    """Ask one question, follow its events, and return the seconds and the answer with how often it ended."""
    started = time.monotonic()
    form = {"question": QUESTION, "seed": str(number), "steps": str(steps)}
    response = await client.post("/v1/answers", files={"video": ("in.mp4", toy_clip(number % 8))}, data=form)
    assert response.status_code == 202, response.text
    name = response.json()["id"]
    ends = 0
    async with client.stream("GET", f"/v1/answers/{name}/events") as events:
        async for line in events.aiter_lines():
            ends += line.removeprefix("event: ") in ENDED
    answer = (await client.get(f"/v1/answers/{name}")).json()
    took = time.monotonic() - started
    clip = await client.get(f"/v1/answers/{name}/video.mp4")
    return took, {"id": name, "state": answer["state"], "ends": ends, "clip": clip.content}


def shown(what: str, took: list[float]) -> None:
    ranked = sorted(took)
    p50, p95 = ranked[len(ranked) // 2], ranked[int(len(ranked) * 0.95)]
    print(f"\n{what}: {len(took)} answers, p50 {p50:.2f} s, p95 {p95:.2f} s")


def test_the_pair_before_training_answers_beside_the_one_that_is_served(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        made = [ask(client, toy_clip(), seed=1, pair=pair).json()["id"] for pair in ("served", "before")]
        served, before = (answered(client, name) for name in made)
        clips = [client.get(answer["questions"][0]["video"]).content for answer in (served, before)]
    assert (served["pair"], before["pair"]) == ("served", "before")
    assert served["questions"][0]["caption"] == before["questions"][0]["caption"]  # only the artist was trained
    assert clips[0] != clips[1]


def test_fifty_askers_are_each_answered_once_although_an_artist_is_killed(address: str) -> None:
    async def all_of_them() -> list[tuple[float, dict]]:
        limits = httpx.Limits(max_connections=2 * ASKERS)
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
            tasks = [asyncio.create_task(asked(client, number, 20)) for number in range(ASKERS)]
            done = 0
            while done < ASKERS // 5:
                await asyncio.sleep(0.05)
                done = sum(task.done() for task in tasks)
            os.kill(await asyncio.to_thread(replica_pid, "artist"), signal.SIGKILL)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(all_of_them())
    shown("50 askers, two artists, one killed", [took for took, _ in answers])
    assert len({answer["id"] for _, answer in answers}) == ASKERS
    assert [(answer["state"], answer["ends"]) for _, answer in answers] == [("done", 1)] * ASKERS
    assert all(answer["clip"] for _, answer in answers)


def test_memory_stays_flat_over_five_hundred_answers(address: str) -> None:
    async def some(first: int, count: int) -> list[float]:
        took: list[float] = []
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:
            for start in range(first, first + count, AT_ONCE):
                took += [
                    t for t, _ in await asyncio.gather(*(asked(client, n, 4) for n in range(start, start + AT_ONCE)))
                ]
        return took

    processes = [psutil.Process(replica_pid(name)) for name in ("ingress", "thinker", "artist")]
    took = asyncio.run(some(1000, 100))
    before = [process.memory_info().rss for process in processes]
    took += asyncio.run(some(2000, ANSWERS - 100))
    grown = [(process.memory_info().rss - was) / 2**20 for process, was in zip(processes, before, strict=True)]
    shown(f"memory grew by {', '.join(f'{mib:+.0f} MiB' for mib in grown)} (ingress, thinker, artist)", took)
    assert max(grown) < 100
