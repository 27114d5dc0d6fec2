"""Which rewards of a run have models of their own, and by which pool each is answered.

A component of ``rewards.weights`` or ``evaluate.rewards`` has one where it is a name under ``models.rewards``, a name of BUNDLED, or
the path of a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from actors.scoring.components import BUILT_IN
from actors.scoring.settings import RewardModelSection
from rewards.custom import is_class, is_custom

if TYPE_CHECKING:  # the sections of the pools are part of it
    from pipeline.config import RunConfig
    from pipeline.fleet.models import Encoder

BUNDLED: Mapping[str, str] = {
    "video_similarity": "actors.scoring.bundled:VideoSimilarity",
    "dino_v": "actors.scoring.bundled:DinoSimilarity",
    "judge": "actors.scoring.judge:Judge",
    "hpsv3": "actors.scoring.hpsv3:HPSv3",
    "videoscore2": "actors.scoring.videoscore2:VideoScore2",
}
"""Rewards with models that come with this project: name → ``module:Class``."""

ENCODERS: Mapping[str, Encoder] = {BUNDLED["video_similarity"]: "video", BUNDLED["dino_v"]: "pictures"}
"""Those whose option ``path`` is an encoder's folder or name, and what it encodes."""


def weighted(config: RunConfig) -> tuple[str, ...]:
    """Return the components that the run's stages weigh, sorted."""
    return tuple(sorted({*config.stage1.rewards.weights, *config.stage2.rewards.weights}))


def scored(config: RunConfig) -> tuple[str, ...]:
    """Return the components that the run's stages weigh or its evaluation measures, sorted."""
    return tuple(sorted({*weighted(config), *config.evaluate.rewards}))


def judge_of(component: str, declared: Iterable[str]) -> str | None:
    """Return the pool that answers for ``component``; None where that is the reward pool.

    A class that is weighed by its path has a pool by its name in small letters.
    """
    if component in declared or component in BUNDLED:
        return component
    return component.rpartition(":")[2].lower() if is_class(component) else None


def reward_models(config: RunConfig) -> dict[str, tuple[str, RewardModelSection]]:
    """Return the component, and its model, of each reward pool that the run has beside the one for all others."""
    declared, found = config.models.rewards, {}
    for component in scored(config):
        pool = judge_of(component, declared)
        if pool is None:
            continue
        section = declared.get(component) or RewardModelSection(model=BUNDLED.get(component, component))
        if section.model in BUNDLED:
            section = section.model_copy(update={"model": BUNDLED[section.model]})
        found[pool] = (component, section)
    return found


def require_rewards(config: RunConfig, kinds: Iterable[str]) -> None:
    """Raise ValueError where rewards with models clash with each other, with the pools ``kinds`` or with built-in components."""
    declared = config.models.rewards
    pools: dict[str, str] = {}
    taken = {*kinds, *BUILT_IN, "learner"}
    for name in declared:
        if name in taken:
            raise ValueError(f"models.rewards.{name}: a pool or a built-in component has that name; choose another")
        model = declared[name].model
        if model not in BUNDLED and not is_class(model):
            raise ValueError(
                f"models.rewards.{name}.model={model!r}: write module:Class, or one of {', '.join(BUNDLED)}; a function "
                "is named in rewards.weights alone"
            )
    for component in config.evaluate.rewards:
        if component not in BUILT_IN and judge_of(component, declared) is None and not is_custom(component):
            raise ValueError(
                f"evaluate.rewards: unknown reward {component!r}; built in are {', '.join((*BUILT_IN, *BUNDLED))}, and your own is "
                "written module:function or module:Class"
            )
    for component in scored(config):
        pool = judge_of(component, declared)
        if pool is None:
            continue
        if pool in pools or (pool in taken) or (pool in declared and component != pool):
            other = pools.get(pool, pool)
            raise ValueError(
                f"rewards.weights: {component!r} would have a pool called {pool!r}, as {other!r} has; give it a name of its "
                f"own: models.rewards.my_{pool}.model={component}, and weigh my_{pool}"
            )
        pools[pool] = component
    unknown = sorted({*config.pools.rewards} - {*pools} - {*declared})
    if unknown:
        raise ValueError(
            f"pools.rewards.{unknown[0]}: the run has no reward with a model of that name"
            + (f"; there are {', '.join(sorted({*pools, *declared}))}" if pools or declared else "")
        )
