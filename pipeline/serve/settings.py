"""Settings of ``vans serve``, as a run's YAML and the server read them. No Ray: the command line reads them.

What a model is loaded with (dtype, context, batch) is its pool's setting; here is how many of it serve, and what people may ask.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from actors.pool.settings import Gpus, PoolSection
from actors.settings import Positive, Section
from cluster import ports

Port = Annotated[int, Field(gt=0, lt=65536)]


class ReplicasSection(Section):
    """Between which limits Ray Serve sizes a deployment by itself, by the requests that each replica has."""

    enabled: bool = Field(False, description="Let Ray Serve change the number of replicas.")
    min: Positive = Field(1, description="Fewest replicas.")
    max: Positive = Field(4, description="Most replicas.")
    target_ongoing_requests: float = Field(
        2.0, gt=0, description="Requests for each replica, those that wait included, that it aims at."
    )

    @model_validator(mode="after")
    def _limits(self) -> ReplicasSection:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        return self


class DeploymentSection(Section):
    """One of the two models behind the server."""

    replicas: Positive = Field(1, description="Replicas to start; autoscale, where it is enabled, decides instead.")
    num_gpus: Gpus | None = Field(None, description="GPUs of each replica; null is its pool's gpus.")
    max_ongoing_requests: Positive = Field(2, description="Requests that a replica holds at once; others wait for one.")
    autoscale: ReplicasSection = Field(default_factory=ReplicasSection)

    def gpus(self, pool: PoolSection) -> float:
        """Return the GPUs of a replica of a model that ``pool`` serves in a run."""
        return pool.gpus if self.num_gpus is None else self.num_gpus


class ThinkerDeploymentSection(DeploymentSection):
    """The thinker behind the server: vLLM makes one batch of all that a replica holds."""

    max_ongoing_requests: Positive = Field(
        64, description="Requests that a replica holds at once; others wait for one."
    )


class LimitsSection(Section):
    """What one person may ask, and how much is kept. Uploads have the limits of data.max_* besides."""

    questions: Positive = Field(8, description="Most questions about one video.")
    question_chars: Positive = Field(1000, description="Longest question in characters.")
    steps: Positive = Field(50, description="Most denoising steps; the default is evaluate.render.steps.")
    guidance: float = Field(
        20.0, ge=1.0, description="Largest guidance scale; the default is evaluate.render.guidance."
    )
    queue: Positive = Field(
        64, description="Videos with unfinished questions at once; further ones get status 429 and Retry-After."
    )
    answer_s: float = Field(1800.0, gt=0, description="Longest time for all questions about a video in seconds.")
    keep_s: float = Field(3600.0, gt=0, description="How long a finished answer is kept, in seconds.")
    keep_mib: Positive = Field(1024, description="Most MiB of finished clips; beyond it the oldest answers go first.")


class ServeSection(Section):
    """``vans serve`` (docs/serve.md)."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen at; another than loopback needs a token."
    )
    port: Port = Field(ports.SERVE, description="Port to listen at.")
    follow_s: float = Field(5.0, gt=0, description="With --follow: seconds between two looks for a newer export.")
    vlm: ThinkerDeploymentSection = Field(default_factory=ThinkerDeploymentSection)
    vdm: DeploymentSection = Field(default_factory=DeploymentSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)
