"""Settings of rewards that have models, as a run's YAML and their workers read them. No Ray, no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from actors.pool.settings import PoolSection
from actors.settings import Section

RewardName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
"""Of a reward with a model: its component, and its pool."""


class RewardModelSection(Section):
    """A reward with a model of its own: what it is."""

    model: str = Field(description="`module:Class`, or the name of one that comes with this project.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the class.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="What its weights are loaded as.")


class EnvironmentSection(Section):
    """Packages of a reward that are not the run's: what Ray makes of it is its workers' alone."""

    pip: list[str] = Field(
        [], description="Requirements that pip installs over the run's own packages, in a copy, on each node."
    )
    python: str | None = Field(
        None,
        description="Python executable of an environment that is there on each node, with the run's ray and numpy.",
    )

    @model_validator(mode="after")
    def _one(self) -> EnvironmentSection:
        if self.python is not None and not self.python.startswith("/"):
            raise ValueError(
                f"python={self.python!r}: an absolute path, the same on each node; Ray runs it as it stands"
            )
        if self.pip and self.python is not None:
            raise ValueError(
                f"pip={self.pip} with python={self.python}: one environment; install the packages into that Python"
            )
        return self


class RewardPoolSection(PoolSection):
    """The workers of one reward with a model: where it runs."""

    start_timeout_s: float = Field(
        900.0,
        gt=0,
        description="Deadline for a worker to load its model, and before that for its environment to be built.",
    )
    env: EnvironmentSection | None = Field(None, description="Packages of its own; null: the run's.")
