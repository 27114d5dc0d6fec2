"""The pools of a run, sized independently, and where they stand.

Turns the configuration into worker actors; the pools themselves know nothing of models, the workers nothing of the configuration.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from cluster.resources import Ask, Placement, PlacementPlan, place
from cluster.session import Session, connect
from pipeline.config import RunConfig
from pipeline.fleet.conditions import Conditions
from pipeline.fleet.models import resolve_adapter, resolve_model

LEARNER = "learner"


def pool_sections(config: RunConfig) -> dict[str, PoolSection]:
    """Return the pools of a run in the order of a step; ``embed`` is one of them where it has workers.

    In a deterministic run a request shares its call with no other.
    """
    pools = config.pools
    embed = {"embed": pools.embed} if pools.embed.workers else {}
    # vLLM makes its batches itself, and is asked for single ones at its start.
    alone = {"max_batch": 1} if config.deterministic else {}
    others = {**embed, "vdm": pools.vdm, "reward": pools.reward}
    return {"vlm": pools.vlm} | {name: pool.model_copy(update=alone) for name, pool in others.items()}


@dataclass(frozen=True)
class Fleet:
    """The pools of a run and the room that was reserved for them and for the learner.

    ``embed`` is None where ``pools.embed.workers`` is 0: each sampler then embeds and encodes for itself.
    """

    vlm: WorkerPool
    vdm: WorkerPool
    reward: WorkerPool
    placement: Placement
    embed: WorkerPool | None = None
    conditions: Conditions | None = None
    resting: tuple[str, ...] = ()
    """Pools that share GPUs with the learner, and give up the memory while it works."""

    def pools(self) -> Iterator[WorkerPool]:
        """Yield the pools in the order of a step."""
        pools = (self.vlm, self.embed, self.vdm, self.reward)
        yield from (pool for pool in pools if pool is not None)


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
        Ask(name, pool.workers, pool.cpus, pool.gpus, pool.resources, pool.placement, pool.labels)
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
    sections = pool_sections(config)
    started = tuple(only or sections)
    makers = _makers(config, started)
    plan = placement_plan(config, only)
    placement = await asyncio.to_thread(place, plan, config.cluster.placement_timeout_s)
    pools = {
        name: WorkerPool(name, makers[name](placement), sections[name], reconsider=partial(placement.reconsider, name))
        for name in sections
    }
    try:
        await _start_all([pools[name] for name in started])
        embed = pools.get("embed")
        conditions = Conditions(embed.submit, config.pools.embed.cache_mib * 2**20) if embed is not None else None
        resting = tuple(name for name, section in sections.items() if section.rest)
        yield Fleet(pools["vlm"], pools["vdm"], pools["reward"], placement, embed, conditions, resting)
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


def _makers(config: RunConfig, started: Sequence[str]) -> dict[str, Callable[[Placement], Callable[[str], Any]]]:
    """Return, by pool, what makes its workers. Missing models of the pools to be started are found here, before they are.

    The workers' modules, which load transformers, diffusers and more for seconds, are imported where a pool is made: a plan, or an
    error in the configuration, needs none of them.
    """
    models, vlm, vdm, reward = config.models, config.pools.vlm, config.pools.vdm, config.pools.reward
    embed = config.pools.embed
    roles = {"vlm": "vlm", "vdm": "vdm", "reward": "clip", "embed": "vdm"}
    vlm_path, vdm_path, clip_path, embed_path = (
        resolve_model(getattr(models, role), role) if pool in started else ""  # type: ignore[arg-type]
        for pool, role in roles.items()
    )
    vlm_adapter = resolve_adapter(models.vlm_adapter, "vlm", vlm_path) if "vlm" in started else None
    vdm_adapter = resolve_adapter(models.vdm_adapter, "vdm", vdm_path) if "vdm" in started else None
    components = sorted({*config.stage1.rewards.weights, *config.stage2.rewards.weights})

    def make_vlm(placement: Placement) -> Callable[[str], Any]:
        from actors.vlm.worker import VlmWorker

        actor = ray.remote(VlmWorker)
        return lambda name: actor.options(
            **placement.options("vlm", name), max_restarts=0, max_concurrency=max(64, 4 * vlm.max_inflight)
        ).remote(
            name,
            vlm_path,
            adapter=vlm_adapter,
            settings=vlm,
            prompt=models.prompt,
            lora_rank=config.stage1.lora.rank,
            broadcast=config.weights.transport == "collective" and config.stage1.lora.rank == 0,
            alone=config.deterministic,
        )

    def make_vdm(placement: Placement) -> Callable[[str], Any]:
        from actors.vdm.wan.files import COMPONENTS
        from actors.vdm.worker import VdmWorker

        exact = {"max_embed": 1, "compile_blocks": False} if config.deterministic else {}
        actor = ray.remote(VdmWorker)
        return lambda name: actor.options(**placement.options("vdm", name), max_restarts=0, max_concurrency=2).remote(
            name,
            vdm_path,
            adapter=vdm_adapter,
            dtype=vdm.dtype,
            device=_device(vdm),
            options={
                "shift": models.flow_shift,
                "grid": models.flow_grid,
                "negative_prompt": models.negative_prompt or "",
                "shared_times": models.shared_times,
                "settings": vdm.model_copy(update=exact),
                "vae_tiling": config.video.vae_tiling,
                "conditioning": config.video.conditioning,
                "components": ("transformer", "vae_decoder") if embed.workers else COMPONENTS,
            },
        )

    def make_embed(placement: Placement) -> Callable[[str], Any]:
        from actors.vdm.embed_worker import EmbedWorker

        actor = ray.remote(EmbedWorker)
        return lambda name: actor.options(**placement.options("embed", name), max_restarts=0, max_concurrency=2).remote(
            name,
            embed_path,
            dtype=embed.dtype,
            device=_device(embed),
            threads=max(1, int(embed.cpus)),
            negative_prompt=models.negative_prompt or "",
            vae_tiling=config.video.vae_tiling,
            conditioning=config.video.conditioning,
        )

    def make_reward(placement: Placement) -> Callable[[str], Any]:
        from actors.scoring.worker import RewardWorker

        actor = ray.remote(RewardWorker)
        return lambda name: actor.options(
            **placement.options("reward", name), max_restarts=0, max_concurrency=2
        ).remote(
            name,
            clip_path,
            components,
            device=_device(reward),
            custom_timeout_s=reward.request_timeout_s / 2,
            answers=models.prompt.answers,
        )

    return {"vlm": make_vlm, "embed": make_embed, "vdm": make_vdm, "reward": make_reward}


def _device(section: PoolSection) -> str:
    return "cuda" if section.gpus > 0 else "cpu"
