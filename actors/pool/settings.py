"""Settings of a pool, as a run's YAML and the pool itself read them. No Ray: the command line reads them.

Responsible for keys, defaults and ranges. What one kind of worker wants besides is in its own room's settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from actors.settings import Positive, Section
from cluster.labels import check_selector
from cluster.layout import Strategy


def _gpu_amount(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: a share of one GPU (at most 1), or whole GPUs")
    return gpus


def _selector(labels: dict[str, str]) -> dict[str, str]:
    check_selector(labels)
    return labels


Gpus = Annotated[float, Field(ge=0), AfterValidator(_gpu_amount)]
Labels = Annotated[dict[str, str], AfterValidator(_selector)]


class AutoscaleSection(Section):
    """Whether the run sizes this pool by itself, and between which limits (docs/operations.md)."""

    enabled: bool = Field(False, description="Let the run change the number of workers.")
    min: Positive = Field(1, description="Fewest workers.")
    max: Positive = Field(4, description="Most workers.")
    target_wait_s: float = Field(
        5.0, gt=0, description="Longest a request should wait for a worker; where one waits longer, the pool grows."
    )
    window_s: float = Field(
        120.0, gt=0, description="How far back it looks. Shorter than a step, it would shrink between two rollouts."
    )
    cooldown_s: float = Field(
        60.0, ge=0, description="Least time between two changes of the size, by hand or by itself."
    )
    step: Positive = Field(1, description="Most workers added or taken away at once.")

    @model_validator(mode="after")
    def _limits(self) -> AutoscaleSection:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        return self


class PoolSection(Section):
    """One elastic pool of workers."""

    workers: Positive = Field(1, description="Workers to start.")
    cpus: float = Field(0.5, ge=0, description="CPU cores reserved per worker.")
    gpus: Gpus = Field(0.0, description="GPUs reserved per worker; a fraction shares one.")
    resources: dict[str, float] = Field(default_factory=dict, description="Custom Ray resources per worker.")
    labels: Labels = Field(
        default_factory=dict,
        description="Ray node labels that the workers' nodes must have: a value, `!value`, `in(a, b)` or `!in(a, b)` for each.",
    )
    placement: Strategy | None = Field(None, description="How the workers lie on nodes; null is cluster.placement.")
    max_batch: Positive = Field(16, description="Most requests in one call of a worker.")
    max_inflight: Positive = Field(1, description="Calls a worker may have at once.")
    max_wait_s: float = Field(0.02, ge=0, description="Longest a request waits for its batch to fill.")
    start_timeout_s: float = Field(300.0, gt=0, description="Deadline for a worker to load its model.")
    request_timeout_s: float = Field(300.0, gt=0, description="Deadline for one call.")
    max_retries: int = Field(3, ge=0, description="Times a request is sent again after an infrastructure failure.")
    max_restarts: int = Field(
        20, ge=0, description="Restarts of the pool's workers within an hour before the run stops."
    )
    rest: bool = Field(
        False,
        description="Give up the GPU's memory while a learner works, for pools that share GPUs with it (docs/weights.md); needs "
        "max_staleness 0.",
    )
    autoscale: AutoscaleSection = Field(default_factory=AutoscaleSection)

    @property
    def receivers(self) -> int:
        """Processes of one worker that take part in a broadcast of weights."""
        return 1

    @model_validator(mode="after")
    def _starts_within_limits(self) -> PoolSection:
        limits = self.autoscale
        if limits.enabled and not limits.min <= self.workers <= limits.max:
            raise ValueError(
                f"workers={self.workers} with autoscale: start with autoscale.min={limits.min} to autoscale.max={limits.max}"
            )
        return self


@dataclass(frozen=True)
class Watch:
    """How a pool watches over its workers: what no run has had to set. Times are seconds."""

    restart_window_s: float = 3600.0
    """A week's run may lose more workers than an hour's: older replacements no longer count against ``max_restarts``."""
    probe_every_s: float = 10.0
    """An idle worker that has not been heard of for this long is pinged."""
    probe_timeout_s: float = 60.0
    """Deadline of a ping, and of a worker's ``shutdown``."""
    max_strikes: int = 3
    """Infrastructure failures in a row after which a worker that still answers pings is replaced."""
    backoff_s: float = 0.5
    """Wait before the second restart in a row of a slot that never became ready; doubles, up to ``max_backoff_s``."""
    max_backoff_s: float = 30.0
