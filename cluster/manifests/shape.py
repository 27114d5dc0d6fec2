"""What manifests are made from: the groups of workers that a run asks for, and what its configuration cannot know of the site."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from cluster.errors import VansError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

ROLE_LABEL = "vans-role"
"""Ray node label that tells the worker groups of a run apart. Without a dot, so that it can stand in a dotted override."""

STOP_WAIT_S = 600
"""Seconds that a run gets between SIGTERM and SIGKILL: an update, then a checkpoint (docs/faults.md)."""

_EPSILON = 1e-4  # Ray counts resources in ten-thousandths
_DNS = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LONGEST_NAME = 47  # of a RayJob, so that the RayCluster it makes has a valid name (KubeRay's check)
_ALTERNATIVES = re.compile(r"in\(\s*([^,)]+)")


class ManifestError(VansError):
    """A run that cannot be written down for such a cluster."""


@dataclass(frozen=True)
class Group:
    """Members of one kind, a pool or a learner, that are placed together: ``count`` bundles of equal size."""

    name: str
    count: int
    bundle: Mapping[str, float]
    """Ray resources of one member: ``CPU``, ``GPU`` and custom ones."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label selector of the members: what their nodes must be labelled with."""
    strategy: Strategy = "PACK"
    most: int = 0
    """Most members that the run may grow to by itself; 0 is ``count``."""
    together: bool = False
    """Whether as many members as fit share a node (ranks that talk over NCCL, GPUs that are shared), or each has a pod of its own."""

    @property
    def gpus(self) -> float:
        """GPUs of one member."""
        return self.bundle.get("GPU", 0.0)


@dataclass(frozen=True)
class RunShape:
    """A run, as far as a cluster is concerned."""

    name: str
    """Name of the run; made fit for Kubernetes by :attr:`slug`."""
    groups: tuple[Group, ...]
    entrypoint: tuple[str, ...]
    """What the driver runs."""
    driver_cpus: float = 1.0
    """CPU slots that the head keeps for the driver's own tasks: decoding video."""
    source: str = ""
    """How the run's configuration was named, for the files' first line."""
    config_file: str | None = None
    """Text of a configuration that is not in the image; ``entrypoint`` or ``application`` then names ``Site.config_path``."""
    application: Mapping[str, Any] | None = None
    """Of a server instead of a run: ``import_path`` and ``args`` of the application for Ray Serve; ``entrypoint`` is empty."""

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"a group may stand once in a run: {names}")

    @property
    def slug(self) -> str:
        """The name in small letters, digits and hyphens. Raises ManifestError where none is left, or too many."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if not _DNS.fullmatch(slug) or len(slug) > _LONGEST_NAME:
            raise ManifestError(
                f"run {self.name!r} would be {slug!r} in Kubernetes: it must begin with a letter and have at most "
                f"{_LONGEST_NAME} letters, digits and hyphens; choose another name (name=…)"
            )
        return slug


@dataclass(frozen=True)
class Site:
    """What a configuration does not say about the cluster that the run goes to."""

    image: str = "REGISTRY/vans-on-ray:gpu"
    """Container image, built from ``cluster/Dockerfile``."""
    namespace: str = "vans"
    gpus_per_node: int = 8
    memory_per_gpu_gib: int = 64
    """Host memory of a pod for each of its GPUs: weights while they are loaded, the object store, frames."""
    memory_per_cpu_gib: int = 8
    """Host memory of a pod without GPUs, for each of its CPUs."""
    head_memory_gib: int = 32
    shared: str = "/shared"
    """Where the storage that all nodes see is mounted."""
    claim: str = "vans-shared"
    """Name of its PersistentVolumeClaim."""
    storage: str = "2Ti"
    growth: int = 2
    """How many times its planned workers a pool may grow to by ``vans scale``, at most."""
    retries: int = 3
    """New clusters that a RayJob is given after a failure; each resumes the run."""
    time_limit: str = "24:00:00"
    """Slurm's time limit."""
    token_secret: str = "vans-ray-token"  # noqa: S105 - names of Secrets, not secrets
    hub_secret: str = "vans-hub"  # noqa: S105
    mlflow_secret: str = "vans-mlflow"  # noqa: S105
    serve_secret: str = "vans-serve-token"  # noqa: S105

    config_path = "/etc/vans/run.yaml"
    """Where the text of a configuration that is not in the image is found."""

    def __post_init__(self) -> None:
        if not self.shared.startswith("/") or len(self.shared) < 2:
            raise ManifestError(f"shared storage {self.shared!r}: give an absolute path, such as /shared")
        for name in (self.namespace, self.claim):
            if not _DNS.fullmatch(name):
                raise ManifestError(f"{name!r} is no name of Kubernetes': small letters, digits and hyphens")


@dataclass(frozen=True)
class Pods:
    """How a group lies on pods (or nodes): ``count`` of them, growing to ``most``, ``members`` on each."""

    count: int
    most: int
    members: int
    resources: Mapping[str, float]
    """Ray resources of one pod; CPU and GPU are whole."""


def ray_version() -> str:
    """Return the version of Ray that the run was checked with, which the image must hold too."""
    return version("ray")


def group_of(name: str, count: int, bundle: Mapping[str, float], **more: object) -> Group:
    """Return a Group; amounts of 0 are left out of its bundle."""
    return Group(name, count, {key: amount for key, amount in bundle.items() if amount > 0}, **more)  # type: ignore[arg-type]


def fold(group: Group, gpus_per_node: int, growth: int = 1) -> Pods:
    """Return the pods for ``group`` on nodes of ``gpus_per_node``.

    Each member has a pod of its own, so that the group grows and shrinks by single workers; members that share a GPU
    share a pod, and those that belong together (``Group.together``, STRICT_PACK) get as few pods as the nodes allow.
    Raises ManifestError where a member, or members that must be on one node, need more GPUs than a node has.
    """
    if group.gpus > gpus_per_node:
        raise ManifestError(
            f"one {group.name} needs {group.gpus:g} GPUs, and a node has {gpus_per_node} (--gpus-per-node)"
        )
    strict = group.strategy == "STRICT_PACK"
    if group.strategy == "STRICT_SPREAD":
        members = 1
    elif group.together or strict:
        fit = math.floor(gpus_per_node / group.gpus + _EPSILON) if group.gpus else group.count
        members = min(group.count, fit)
        if strict and members < group.count:
            raise ManifestError(
                f"{group.count} {group.name} are to be on one node (STRICT_PACK) and need {group.count * group.gpus:g} GPUs; "
                f"a node has {gpus_per_node} (--gpus-per-node)"
            )
        members = math.ceil(group.count / math.ceil(group.count / members))  # even: 6 on 4-GPU nodes are 3 + 3
    else:
        members = max(1, math.floor(1 / group.gpus + _EPSILON)) if 0 < group.gpus < 1 else 1
        members = min(members, group.count)
    count = math.ceil(group.count / members)
    grown = count if group.together or strict else max(math.ceil(group.most / members), growth * count)
    resources = {key: amount * members for key, amount in group.bundle.items()}
    for key in ("CPU", "GPU"):
        if key in resources or key == "CPU":
            resources[key] = float(math.ceil(resources.get(key, 0.0) - _EPSILON))
    resources["CPU"] = max(1.0, resources["CPU"])
    return Pods(count, grown, members, resources)


def node_labels(group: Group) -> dict[str, str]:
    """Return labels that a node needs to take members of ``group``: a value for each condition that asks for one."""
    labels = {}
    for key, condition in group.labels.items():
        if condition.startswith("!"):
            continue  # a node without the label meets it
        choice = _ALTERNATIVES.match(condition)
        labels[key] = choice[1].strip() if choice else condition
    return labels


def shared_labels(groups: tuple[Group, ...]) -> dict[str, str]:
    """Return labels for nodes that are all alike, so that each takes members of every group.

    Raises ManifestError where two groups want different values of one label.
    """
    labels: dict[str, str] = {}
    for group in groups:
        for key, value in node_labels(group).items():
            if labels.setdefault(key, value) != value:
                raise ManifestError(
                    f"{group.name} wants nodes with {key}={value} and another group wants {key}={labels[key]}; here all nodes "
                    "are alike: leave the labels out of the configuration"
                )
    return labels


def header(run: RunShape, kind: str) -> str:
    """Return the first lines of a generated file."""
    return (
        f"# Written by: vans manifests {run.source or run.name} --kind {kind}\n"
        "# Sizes, labels and the entrypoint follow the run's configuration: change that and write the file anew (docs/cluster.md).\n"
    )
