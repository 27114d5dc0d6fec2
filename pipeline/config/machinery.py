"""Sections of the machinery: weights, cluster, tracking, checkpoints, alarms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from actors.settings import Positive, Section
from cluster.harmless import redacted
from cluster.layout import Strategy
from pipeline.support.location import Location
from rewards.alarms import AlarmSettings


class WeightsSection(Section):
    """How published weights reach the workers (docs/weights.md)."""

    transport: Literal["object_store", "collective"] = Field(
        "object_store",
        description="object_store: each worker pulls them. collective: full weights are broadcast from the learner to the workers "
        "(NCCL between GPUs, gloo between CPUs), and pulled only by those who miss it. Adapters are always pulled.",
    )
    join_timeout_s: float = Field(
        10.0, gt=0, description="Longest that a broadcast waits for the other workers once the first is there."
    )
    transfer_timeout_s: float = Field(
        120.0, gt=0, description="Deadline of the broadcast itself; who has not everything by then pulls."
    )


class ClusterSection(Section):
    """Where the run lives."""

    address: str | None = Field(None, description="Ray address; null starts a local cluster (RAY_ADDRESS wins).")
    local_cpus: Positive | None = Field(
        None, description="CPU slots of the local cluster; null is 4 x the machine's cores (tiny models share)."
    )
    object_store_mib: Positive = Field(512, description="Object store of the local cluster.")
    layout: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description="disaggregated: every pool and the learner on GPUs of their own. colocated: those with a share of a GPU meet "
        "on the same ones (docs/placement.md).",
    )
    placement: Strategy = Field("PACK", description="How what the run reserves lies on nodes.")
    placement_timeout_s: float = Field(60.0, gt=0, description="Longest wait for room.")
    can_grow: bool = Field(
        False,
        description="An autoscaler adds and removes nodes: what has no room yet is waited for, and pools reserve none, so that nodes "
        "come and go with their workers (docs/operations.md).",
    )


class RolloutsSection(Section):
    """Every rollout of the run, to look at: Parquet files in its folder (docs/rollouts.md)."""

    every: int = Field(1, ge=0, description="Steps between those whose rollouts are stored; 0 stores none.")
    keep_steps: Positive = Field(50, description="Newest stored steps that are kept of each stage.")
    clips: Literal["all", "best_worst", "none"] = Field(
        "best_worst",
        description="Whose clips are stored: all; those with the highest and the lowest reward of each group; none, and no input "
        "and true clip either.",
    )
    replay: bool = Field(
        False,
        description="Store what the learner read too, tensors and all: a step that follows a checkpoint can then be fed to the "
        "learner alone (`vans replay`). Large: every frame, latent and embedding of the step.",
    )


SinkName = Literal["tensorboard", "wandb"]


class TrackingSection(Section):
    """MLflow. The environment's MLFLOW_TRACKING_URI wins over ``uri``."""

    uri: str | None = Field(None, description="Tracking server; null is sqlite in the run's folder.")
    experiment: str = Field("vans", description="Experiment name.")
    clips_every: int = Field(10, ge=0, description="Steps between logged sample clips; 0 logs none.")
    also: list[SinkName] = Field(
        [],
        description="Where figures and pictures go beside MLflow, which stays the record: tensorboard (event files in the run's "
        "folder), wandb (Weights & Biases, which reads WANDB_API_KEY and WANDB_MODE).",
    )
    rollouts: RolloutsSection = Field(default_factory=RolloutsSection)

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and redacted(uri) != uri:  # a configuration is logged, and stands in every checkpoint
            raise ValueError(
                f"{redacted(uri)} holds a password, which would be logged with the run; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD for a server, or MLFLOW_TRACKING_URI for a database"
            )
        return uri


class ControlSection(Section):
    """Watching and changing the run's pools while it runs (docs/operations.md)."""

    every_s: float = Field(
        1.0,
        gt=0,
        description="Time between two looks at the pools, for `vans status`, Ray's metrics and the autoscaler.",
    )
    trace_every_s: float = Field(
        10.0, ge=0, description="Time between two lines of `pools.jsonl` in the run's folder; 0 writes none."
    )


class CheckpointSection(Section):
    """Checkpoints of the run."""

    every: int = Field(20, ge=0, description="Steps between checkpoints; 0 writes one at the end of each stage only.")
    keep: Positive = Field(3, description="Checkpoints kept per stage.")
    max_failures: Positive = Field(
        3,
        description="Checkpoints in a row that cannot be written, or not be sent to the mirror, before the run stops; a stage's "
        "last one that cannot be written always does.",
    )
    mirror: Location | None = Field(
        None,
        description="Folder, best a URI such as s3://bucket/runs/x, to which every checkpoint and export is copied, and from which "
        "--resume restores an empty out (docs/operations.md); null copies nothing.",
    )
    mirror_timeout_s: float = Field(
        900.0,
        gt=0,
        description="Longest time for sending one checkpoint to the mirror, retries included, and for which the run's end waits.",
    )


class AlarmsSection(AlarmSettings, Section):
    """Alarms against reward hacking (docs/rewards.md); null turns one off. They warn, and change no reward."""
