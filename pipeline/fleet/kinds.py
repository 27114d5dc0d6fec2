"""The table of pools: for each kind its section in a run's YAML, and a row that says which workers it has.

Responsible for what a kind is to a run: settings, worker, the worker's arguments. Not responsible for starting pools (``open``) or for
what is asked of them (``pipeline.stages``). The command line reads the sections: workers are imported where a pool is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from actors.pool.settings import PoolSection
from actors.scoring.settings import EnvironmentSection, RewardModelSection, RewardName, RewardPoolSection
from actors.settings import Section
from actors.vdm.settings import SAMPLERS_SHARE, EmbedPoolSection, VdmPoolSection
from actors.vlm.settings import VlmPoolSection
from pipeline.fleet.models import require_shareable, resolve_adapter, resolve_model, vdm_options
from pipeline.fleet.rewards import ENCODERS, judge_of, reward_models, scored

if TYPE_CHECKING:  # a run's configuration is made of these sections
    from pipeline.config import RunConfig


class PoolsSection(Section):
    """The pools, sized independently."""

    vlm: VlmPoolSection = Field(default_factory=VlmPoolSection)
    embed: EmbedPoolSection = Field(default_factory=EmbedPoolSection)
    vdm: VdmPoolSection = Field(default_factory=VdmPoolSection)
    reward: PoolSection = Field(default_factory=PoolSection)
    rewards: dict[RewardName, RewardPoolSection] = Field(
        default_factory=dict,
        description="Reward with a model of its own → its pool, with the keys of pools.reward and env (docs/rewards.md).",
    )

    def sections(self) -> dict[str, PoolSection]:
        """Return the sections that a user wrote, or did not change, by dotted key below ``pools``."""
        fixed = {name: getattr(self, name) for name in KINDS}
        return fixed | {f"rewards.{name}": section for name, section in self.rewards.items()}


@dataclass(frozen=True)
class Kind:
    """One kind of pool. Its key in ``KINDS`` is the name of its field in ``PoolsSection``."""

    worker: str
    """``module:Class`` of its workers (``actors.pool.protocol``)."""
    arguments: Callable[[RunConfig], Mapping[str, Any]]
    """Keyword arguments of a worker beside its name; raises CheckpointError where a model is missing, ConfigError where
    it cannot do what its section says.
    """
    calls: Callable[[Any], int] = lambda section: 2
    """Calls that a worker's process takes at once, by its section: the call under way, and a ping."""
    alone: Mapping[str, Any] = field(default_factory=lambda: {"max_batch": 1})
    """What a deterministic run changes in its section, so that a request shares its call with no other."""
    component: str | None = None
    """The reward that it answers for, where it is the pool of one with a model."""

    def load(self) -> type:
        """Return the workers' class; loads what it needs, which takes seconds."""
        module, _, name = self.worker.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        return found


def _vlm(config: RunConfig) -> dict[str, Any]:
    models, rank = config.models, config.stage1.lora.rank
    path = resolve_model(models.vlm, "vlm")
    return {
        "model_path": path,
        "adapter": resolve_adapter(models.vlm_adapter, "vlm", path),
        "settings": config.pools.vlm,
        "prompt": models.prompt,
        "lora_rank": rank,
        "broadcast": config.weights.transport == "collective" and rank == 0,
        "alone": config.deterministic,
    }


def _embed(config: RunConfig) -> dict[str, Any]:
    section = config.pools.embed
    return {
        "model_path": resolve_model(config.models.vdm, "vdm"),
        "dtype": section.dtype,
        "device": device(section),
        "threads": max(1, int(section.cpus)),
        "negative_prompt": config.models.negative_prompt or "",
        "tiling": config.video.tiling,
        "conditioning": config.video.conditioning,
    }


def _vdm(config: RunConfig) -> dict[str, Any]:
    models, section = config.models, config.pools.vdm
    path = resolve_model(models.vdm, "vdm")
    require_shareable(config, SAMPLERS_SHARE)
    exact = {"max_embed": 1, "compile_blocks": False} if config.deterministic else {}
    embedded = {"components": ("transformer", "vae_decoder")} if config.pools.embed.workers else {}
    return {
        "model_path": path,
        "adapter": resolve_adapter(models.vdm_adapter, "vdm", path),
        "dtype": section.dtype,
        "device": device(section),
        "options": {
            **vdm_options(config),
            **embedded,
            "settings": section.model_copy(update=exact),
        },
    }


def _reward(config: RunConfig) -> dict[str, Any]:
    section = config.pools.reward
    return {
        "clip_path": resolve_model(config.models.clip, "clip"),
        "components": [name for name in scored(config) if judge_of(name, config.models.rewards) is None],
        "device": device(section),
        "custom_timeout_s": section.request_timeout_s / 2,
        "answers": config.models.prompt.answers,
    }


def device(section: PoolSection) -> str:
    """Return the device of a pool's workers."""
    return "cuda" if section.gpus > 0 else "cpu"


KINDS: dict[str, Kind] = {
    # vLLM makes its batches itself, and is asked for single ones at its start.
    "vlm": Kind("actors.vlm.worker:VlmWorker", _vlm, lambda section: max(64, 4 * section.max_inflight), alone={}),
    "embed": Kind("actors.vdm.embed_worker:EmbedWorker", _embed),
    "vdm": Kind("actors.vdm.worker:VdmWorker", _vdm),
    "reward": Kind("actors.scoring.worker:RewardWorker", _reward),
}
"""The kinds of pools in the order of a step. A run has those with workers, and one for each reward with a model."""


def kinds_of(config: RunConfig) -> dict[str, Kind]:
    """Return the rows of the run's pools in the order of a step: KINDS, and the rewards with models by the names of their pools."""
    return KINDS | {
        pool: Kind(
            "actors.scoring.model_worker:ModelWorker", partial(_model, pool, component, section), component=component
        )
        for pool, (component, section) in reward_models(config).items()
    }


def section_of(config: RunConfig, pool: str) -> PoolSection:
    """Return the settings of a pool of the run, by its name."""
    if pool in KINDS:
        section: PoolSection = getattr(config.pools, pool)
        return section
    return config.pools.rewards.get(pool, RewardPoolSection())


def key_of(pool: str) -> str:
    """Return the dotted key of a pool's section."""
    return f"pools.{pool}" if pool in KINDS else f"pools.rewards.{pool}"


def _model(pool: str, component: str, model: RewardModelSection, config: RunConfig) -> dict[str, Any]:
    section, options = section_of(config, pool), dict(model.options)
    role = ENCODERS.get(model.model)
    if role == "video":
        options.setdefault("path", "tiny")
    if role is not None and "path" in options:
        options["path"] = resolve_model(str(options["path"]), role, f"models.rewards.{pool}.options.path")
    return {
        "component": component,
        "path": model.model,
        "options": options,
        "device": device(section),
        "dtype": model.dtype,
        "threads": max(1, int(section.cpus)),
    }


def runtime_env(section: PoolSection) -> dict[str, Any]:
    """Return Ray's ``runtime_env`` of a pool's workers; empty where they have the run's environment."""
    env: EnvironmentSection | None = getattr(section, "env", None)
    if env is None:
        return {}
    if env.pip:
        return {"pip": env.pip, "config": {"setup_timeout_seconds": int(section.start_timeout_s)}}
    return {"py_executable": env.python} if env.python else {}
