"""The learner groups of a run, as its configuration wants them, and what becomes of what they have learnt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from rich.console import Console

from actors.learner.group import LearnerGroup
from actors.learner.spec import LearnerSpec
from actors.records import derive_seed
from actors.weights.broadcast import BroadcastSpec
from pipeline.config import RunConfig
from pipeline.config.stages import Stage1Section, Stage2Section
from pipeline.fleet.models import resolve_adapter, resolve_model, vdm_options
from pipeline.fleet.open import LEARNER, Fleet, at_rest
from pipeline.stages.loop import Learners, Stage, pool_of
from pipeline.stages.table import AnyStage
from pipeline.support.progress import waiting

OpenLearners = Callable[[RunConfig, AnyStage, Fleet, Console], AbstractAsyncContextManager[Learners]]
"""Starts the learner groups of a stage, and ends them with the block."""


def _averaged(learners: Learners) -> Learners:
    """Return the learners whose exports hold other weights than those that sample: an average, or what these follow slowly."""
    specs = {policy: learner.spec for policy, learner in learners.items()}
    return {p: learners[p] for p, spec in specs.items() if spec.optim.ema > 0 or spec.learning.samples_apart()}


async def serve_averages(stage: Stage, learners: Learners) -> None:
    """Serve what each learner exports, where other weights sampled: it is the stage's result, which what comes next asks."""
    for policy, learner in _averaged(learners).items():
        await pool_of(stage, policy).set_weights(learner.version + 1, await learner.publish(averaged=True))


@asynccontextmanager
async def learners_open(config: RunConfig, stage: AnyStage, fleet: Fleet, console: Console) -> AsyncIterator[Learners]:
    """Start a learner group for each policy that ``stage`` trains, and end them with the block."""
    group, ranks = fleet.placement.group(LEARNER), config.learner.ranks
    bundles = fleet.placement.bundles(LEARNER)
    learners = {
        policy: LearnerGroup(
            learner_spec(config, stage, policy), group, bundles[i * ranks : (i + 1) * ranks] if group else None
        )
        for i, policy in enumerate(stage.policies)
    }
    try:
        with waiting(console, f"starting the {' and the '.join(learners)} learner ({ranks} ranks)"):
            async with at_rest(fleet):
                await asyncio.gather(*(learner.start() for learner in learners.values()))
        yield learners
    finally:
        await asyncio.gather(*(learner.close() for learner in learners.values()))


@asynccontextmanager
async def averages_served(stage: Stage, learners: Learners) -> AsyncIterator[None]:
    """Within it the pools serve what an export would hold; afterwards, under versions above it, the weights themselves again."""
    await serve_averages(stage, learners)
    yield
    # Not where the block raises: an error there ends the stage, or its learners are begun anew and serve.
    for policy, learner in _averaged(learners).items():
        learner.first_version += 2
        await pool_of(stage, policy).set_weights(learner.version, await learner.publish())


def section_of(config: RunConfig, policy: str) -> Stage1Section | Stage2Section:
    """Return the section of the stage that is ``policy``'s own; in all-in-one too it says how the policy learns."""
    return config.stage1 if policy == "vlm" else config.stage2


def export_name(config: RunConfig, policy: str) -> str:
    """Return what the trained ``policy`` is called in a run's folder: an adapter is no model, and the other way round."""
    return f"{policy}_adapter" if section_of(config, policy).lora.rank else f"{policy}_model"


def learner_spec(config: RunConfig, stage: AnyStage, policy: str) -> LearnerSpec:
    """Return the learner group that ``stage`` trains ``policy`` with, as the policy's own stage says."""
    models = config.models
    section = section_of(config, policy)
    longest = section.text.max_tokens if isinstance(section, Stage1Section) else section.sde.window_size
    seed = derive_seed(config.seed, stage.name, policy, "learner")
    options: dict[str, Any] = {
        "temperature": section.text.temperature,
        "shared_prompts": config.learner.shared_prompts,
        "engine_dtype": config.pools.vlm.dtype,
        "prompt": models.prompt,
    }
    if policy == "vdm":  # every trajectory comes with what it was conditioned on
        options = {**vdm_options(config), "components": ("transformer",)}
    model = resolve_model(getattr(models, policy), policy)  # type: ignore[arg-type]
    return LearnerSpec(
        kind=policy,
        model_path=model,
        settings=config.learner,
        adapter_path=resolve_adapter(getattr(models, f"{policy}_adapter"), policy, model),  # type: ignore[arg-type]
        lora=section.lora if section.lora.rank else None,
        broadcast=BroadcastSpec(config.weights.join_timeout_s, config.weights.transfer_timeout_s)
        if config.weights.transport == "collective"
        else None,
        objective=section.objective,
        learning=section.learning,
        longest=longest,
        optim=section.optim,
        policy_kwargs=options,
        seed=seed % 2**31,
        name=f"{policy}-learner",
        total_steps=stage.section.steps
        * stage.section.learning.updates_per_batch
        * stage.section.learning.epochs_per_batch,
    )
