"""The pools of a run, sized independently, and where they stand.

Turns the configuration into worker actors; the pools themselves know nothing of models, the workers nothing of the configuration.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from actors.scoring.components import BUILT_IN
from actors.scoring.model import Facts
from cluster.resources import Ask, Placement, PlacementPlan, place
from cluster.session import Session, connect
from pipeline.config import RunConfig
from pipeline.fleet.conditions import Conditions
from pipeline.fleet.kinds import Kind, kinds_of, runtime_env, section_of
from pipeline.fleet.rewards import reward_models, scored
from pipeline.fleet.scoring import Scoring

LEARNER = "learner"


def pool_sections(config: RunConfig) -> dict[str, PoolSection]:
    """Return the pools of a run in the order of a step: the kinds that have workers, and the rewards with models.

    In a deterministic run a request shares its call with no other.
    """
    kinds = kinds_of(config)
    sections = {name: section_of(config, name) for name in kinds}
    return {
        name: section.model_copy(update=kinds[name].alone) if config.deterministic else section
        for name, section in sections.items()
        if section.workers
    }


def answering(config: RunConfig) -> tuple[str, ...]:
    """Return what ``open_fleet`` starts to answer and to measure alone: every pool but those of rewards that only stages weigh.

    Empty, which is all, where there are none.
    """
    spare = {*reward_models(config)} - {*measuring(config)}
    return tuple(name for name in pool_sections(config) if name not in spare) if spare else ()


def measuring(config: RunConfig) -> tuple[str, ...]:
    """Return what ``open_fleet`` starts to measure answers that are there: the reward pool, and those of ``evaluate.rewards``."""
    judges = reward_models(config)
    return ("reward", *(name for name, (component, _) in judges.items() if component in config.evaluate.rewards))


@dataclass(frozen=True)
class Fleet:
    """The pools of a run and the room that was reserved for them and for the learner.

    ``conditions`` is None where there is no embed pool: each sampler then embeds and encodes for itself.
    """

    named: Mapping[str, WorkerPool]
    """The pools by kind (``pipeline.fleet.kinds``), in the order of a step."""
    placement: Placement
    conditions: Conditions | None = None
    scoring: Scoring | None = None
    """What shares a request for scores between pools; None where the reward pool answers for every component alone."""
    resting: tuple[str, ...] = ()
    """Pools that share GPUs with the learner, and give up the memory while it works."""

    @property
    def vlm(self) -> WorkerPool:
        """The thinker's engines."""
        return self.named["vlm"]

    @property
    def vdm(self) -> WorkerPool:
        """The artist's samplers."""
        return self.named["vdm"]

    @property
    def reward(self) -> WorkerPool:
        """The scorers."""
        return self.named["reward"]

    def pools(self) -> Iterator[WorkerPool]:
        """Yield the pools in the order of a step."""
        yield from self.named.values()


@contextmanager
def cluster_session(config: RunConfig) -> Iterator[Session]:
    """Join the configured cluster, or start a local one for the length of the block."""
    section = config.cluster
    with connect(section.address, local_cpus=section.local_cpus, object_store_mib=section.object_store_mib) as session:
        yield session


def placement_plan(config: RunConfig, only: Sequence[str] = ()) -> PlacementPlan:
    """Return what the run asks of the cluster. The two stages share the learner's room; all-in-one needs it twice.

    ``only`` names the pools that are started (all, and the learner, by default).
    """
    learner = config.learner
    asks = [
        Ask(
            *(name, pool.workers, pool.cpus, pool.gpus, pool.resources, pool.placement, pool.labels),
            reserved=not config.cluster.can_grow,
        )
        for name, pool in pool_sections(config).items()
        if not only or name in only
    ]
    if not only:
        groups = 2 if config.training == "all_in_one" else 1
        asks.append(
            Ask(
                LEARNER,
                groups * learner.ranks,
                learner.cpus,
                learner.gpus,
                strategy=learner.placement,
                labels=learner.labels,
                apart=learner.ranks,
            )
        )
    return PlacementPlan(tuple(asks), strategy=config.cluster.placement, layout=config.cluster.layout)


@asynccontextmanager
async def open_fleet(config: RunConfig, *, only: Sequence[str] = ()) -> AsyncIterator[Fleet]:
    """Reserve room, start the pools together, and end them with the block.

    ``only`` starts the named pools alone; the others exist and refuse requests.
    """
    sections, kinds = pool_sections(config), kinds_of(config)
    started = tuple(only or sections)
    arguments = {
        name: kinds[name].arguments(config) for name in started
    }  # a missing model is found before anything starts
    plan = placement_plan(config, only)
    cluster = config.cluster
    placement = await asyncio.to_thread(place, plan, cluster.placement_timeout_s, can_grow=cluster.can_grow)
    pools = {
        name: WorkerPool(
            name,
            _maker(name, kinds[name], section, arguments.get(name, {}), placement),
            section,
            reconsider=partial(placement.reconsider, name),
        )
        for name, section in sections.items()
    }
    try:
        await _start_all([pools[name] for name in started])
        embed = pools.get("embed")
        conditions = Conditions(embed.submit, config.pools.embed.cache_mib * 2**20) if embed is not None else None
        resting = tuple(name for name, section in sections.items() if section.rest)
        yield Fleet(pools, placement, conditions, await _scoring(config, pools, started), resting)
    finally:
        await asyncio.gather(*(pool.close() for pool in pools.values()))
        placement.remove()


@asynccontextmanager
async def at_rest(fleet: Fleet) -> AsyncIterator[None]:
    """Within it, the pools of ``fleet.resting`` have given up their GPUs' memory, and take no requests."""
    pools = [pool for pool in fleet.pools() if pool.name in fleet.resting]
    try:
        await asyncio.gather(*(pool.rest() for pool in pools))
        yield
    finally:
        for pool in pools:
            pool.wake()


async def serve_trained(pool: WorkerPool, folder: str | Path, version: int) -> None:
    """Make every worker of ``pool`` serve what a learner exported to ``folder``, adapter or whole model, as ``version``."""
    from actors.weights.files import read_weights
    from actors.weights.transport import send

    await pool.set_weights(version, send(await asyncio.to_thread(read_weights, folder, version)))


async def _scoring(config: RunConfig, pools: Mapping[str, WorkerPool], started: Sequence[str]) -> Scoring | None:
    """Return what shares requests for scores between the pools that are ``started``; None where every component is built in."""
    kinds = kinds_of(config)
    judges = {kind.component: name for name in started if (kind := kinds[name]).component is not None}
    if "reward" not in started or not ({*scored(config)} - {*BUILT_IN}):
        return None
    facts: dict[str, Facts] = {}
    for name in ("reward", *judges.values()):
        for told in (await pools[name].call_all("facts")).values():
            facts |= told
    return Scoring(pools["reward"].submit, {component: pools[name].submit for component, name in judges.items()}, facts)


async def _start_all(pools: list[WorkerPool]) -> None:
    """Start ``pools`` together; the first that fails stops the others."""
    tasks = [asyncio.create_task(pool.start()) for pool in pools]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _maker(
    name: str, kind: Kind, section: PoolSection, arguments: Mapping[str, Any], placement: Placement
) -> Callable[[str], Any]:
    """Return what makes the workers of the pool ``name``."""
    actor, calls, env = ray.remote(kind.load()), kind.calls(section), runtime_env(section)
    own = {"runtime_env": env} if env else {}
    return lambda worker: actor.options(
        **placement.options(name, worker), **own, max_restarts=0, max_concurrency=calls
    ).remote(worker, **arguments)
