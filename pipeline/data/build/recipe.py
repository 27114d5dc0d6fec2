"""A recipe: where the videos are, which stages they go through in which order, and the models that are asked.

``stages`` is a mapping whose order counts: name → settings of the stage, with ``use`` (default: the name itself), ``workers``,
``cpus``, ``gpus`` and ``batch`` among them. Not responsible for running one (``run``).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.settings import FREE, Positive, Section
from cluster.errors import ConfigError
from cluster.harmless import short
from pipeline.config.load import apply_override, find_yaml, parse_section, read_mapping
from pipeline.data.build.models import ModelSection
from pipeline.data.build.store import digest_of
from pipeline.data.importers.vans_row import LANGUAGES
from pipeline.support.location import LocalPath, Location

BUNDLED = Path(__file__).parent / "recipes"
STAGES = {
    "probe": "pipeline.data.build.probing:Probe",
    "shots": "pipeline.data.build.shots:Shots",
    "exclude": "pipeline.data.build.evaluation:Exclude",
    "cut": "pipeline.data.build.cutting:Cut",
    "gates": "pipeline.data.build.gates:Gates",
    "neighbours": "pipeline.data.build.pairs:Neighbours",
    "describe": "pipeline.data.build.procedural:Describe",
    "question": "pipeline.data.build.procedural:Question",
    "what_if": "pipeline.data.build.predictive:WhatIf",
    "review": "pipeline.data.build.review:Review",
}
"""What a stage may ``use`` by name; any other is a path ``module:Class``."""


class SourcesSection(Section):
    """The videos."""

    videos: Location = Field(Path("videos"), description="Folder of videos: a path or a URI.")
    annotations: list[LocalPath] = Field(
        [],
        description="COIN's or YouCook2's JSON, or JSON lines of video, start, end, label. Without one, all videos are taken.",
    )
    listed: LocalPath | None = Field(
        None, description="Without annotations: text file that names the videos to take, one a line."
    )


class BudgetSection(Section):
    """What may be spent, all calls of the command together. What is spent up ends the build gently; a larger budget continues it."""

    max_tokens_total: Positive | None = Field(None, description="Tokens of prompts and answers; null: no bound.")
    max_cost: float | None = Field(None, gt=0, description="Cost by the models' prices; null: no bound.")


class StageSection(Section):
    """One stage: its resources, and under ``settings`` what the stage itself is set by."""

    use: str = Field("", description="Name of a bundled stage or module:Class; default: the stage's own name.")
    workers: Positive = Field(1, description="Workers side by side.", json_schema_extra=FREE)
    cpus: float = Field(1.0, ge=0, description="CPUs of a worker.", json_schema_extra=FREE)
    gpus: float = Field(0.0, ge=0, description="GPUs of a worker.", json_schema_extra=FREE)
    batch: Positive = Field(1, description="Videos that a worker is given at a time.", json_schema_extra=FREE)
    threads: Positive = Field(
        1,
        description="Calls that a worker has under way at a time, for stages that wait for something else. A stage that asks a model "
        "has its share of the model's concurrency instead.",
        json_schema_extra=FREE,
    )
    settings: dict[str, Any] = Field(
        {}, description="The stage's own settings; in a recipe they stand beside the keys above."
    )

    @model_validator(mode="before")
    @classmethod
    def _own_settings(cls, values: Any) -> Any:
        if values is None:
            return {}
        if not isinstance(values, dict) or "settings" in values:
            return values
        keys = cls.model_fields.keys()
        own = {name: value for name, value in values.items() if name not in keys}
        return {name: value for name, value in values.items() if name in keys} | {"settings": own}


class Recipe(Section):
    """How a dataset is built."""

    name: str = Field("build", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the recipe.")
    seed: int = Field(0, description="Seed of the splits and of the models' sampling.")
    sources: SourcesSection = Field(default_factory=SourcesSection)
    languages: Literal["eng", "chn", "both"] = Field("eng", description="What the rows speak.")
    models: dict[str, ModelSection] = Field({}, description="The models that stages ask, by a name of your own.")
    stages: dict[str, StageSection] = Field(..., min_length=1, description="The stages, in their order.")
    budget: BudgetSection = Field(default_factory=BudgetSection, json_schema_extra=FREE)

    @property
    def spoken(self) -> tuple[str, ...]:
        """The languages of the rows as ``meta`` has them, ISO 639-1."""
        return tuple(LANGUAGES.values()) if self.languages == "both" else (LANGUAGES[self.languages],)


@dataclass(frozen=True)
class StagePlan:
    """A stage that was found, with its settings checked."""

    name: str
    section: StageSection
    stage: type[Any]
    settings: Section

    @property
    def model(self) -> str | None:
        """The name of the model that it asks."""
        return getattr(self.settings, "model", None)

    @property
    def path(self) -> str:
        """module:Class"""
        return f"{self.stage.__module__}:{self.stage.__qualname__}"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that ``source``, a YAML file or the name of a bundled one, describes, with ``overrides``.

    Raises ConfigError with one line per mistake.
    """
    values = read_mapping(find_yaml(source, BUNDLED, "recipe", "recipes"), "recipe")
    for override in overrides:
        apply_override(values, override, Recipe)
    return parse_section(Recipe, values, str(source))


def plan_stages(recipe: Recipe) -> list[StagePlan]:
    """Return the stages of ``recipe``; raises ConfigError for one that there is not, for a key that it does not have, …"""
    plans = [_plan(name, section) for name, section in recipe.stages.items()]
    for plan in plans:
        if plan.model is not None and plan.model not in recipe.models:
            known = ", ".join(recipe.models) or "none is set"
            raise ConfigError(f"stages.{plan.name}.model={short(plan.model)}: no such model under models ({known})")
    for name, model in recipe.models.items():
        workers = sum(plan.section.workers for plan in plans if plan.model == name)
        if model.engine is None and workers > model.concurrency:
            raise ConfigError(
                f"models.{name}.concurrency={model.concurrency}: {workers} workers ask it, each one at a time or more; "
                "raise it, or lower the stages' workers"
            )
    return plans


def _plan(name: str, section: StageSection) -> StagePlan:
    key, use = f"stages.{name}", section.use or name
    path = STAGES.get(use, use)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ConfigError(f"{key}: no stage {use!r}; there are {', '.join(STAGES)}, or module:Class of your own")
    try:
        stage = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}.use={path}: {error}; is it on PYTHONPATH, on each node?") from error
    settings = getattr(stage, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, Section) and callable(stage)):
        raise ConfigError(f"{key}.use={path}: a stage is a class with a Section named Settings inside (docs/build.md)")
    return StagePlan(name, section, stage, parse_section(settings, section.settings, key, f"{key}."))


def bound(section: Section) -> dict[str, Any]:
    """Return the values of ``section`` without the keys that may differ between a build and its continuation."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra, value = field.json_schema_extra, getattr(section, name)
        if isinstance(extra, dict) and extra.get("free"):
            continue
        found[name] = (
            bound(value) if isinstance(value, Section) else section.model_dump(mode="json", include={name})[name]
        )
    return found


def stage_identity(recipe: Recipe, plan: StagePlan) -> str:
    """Return the digest of all that the output of a stage depends on, beside the video."""
    model = bound(recipe.models[plan.model]) if plan.model is not None else None
    return digest_of("stage", plan.path, bound(plan.settings), model, recipe.spoken, recipe.seed)


def recipe_identity(recipe: Recipe, plans: Sequence[StagePlan]) -> str:
    """Return the digest of all that the rows depend on, beside the videos."""
    return digest_of("recipe", recipe.name, [[plan.name, stage_identity(recipe, plan)] for plan in plans])
