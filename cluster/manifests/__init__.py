"""What puts a run on a cluster.

For: KubeRay manifests, a Slurm script, a file for Ray's cluster launcher, a submit script, all pure.
Not for: reading a configuration (``vans manifests`` does that and hands over sizes).
Begin with ``shape``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from cluster.manifests.kuberay import kubernetes_files
from cluster.manifests.launcher import launcher_files
from cluster.manifests.shape import Group, ManifestError, RunShape, Site, fold, group_of
from cluster.manifests.slurm import slurm_files
from cluster.manifests.submit import submit_files

Kind = Literal["rayjob", "raycluster", "rayservice", "slurm", "launcher"]
KINDS: tuple[Kind, ...] = get_args(Kind)

__all__ = ["KINDS", "Group", "Kind", "ManifestError", "RunShape", "Site", "fold", "group_of", "render"]

_MAKERS: Mapping[Kind, Callable[[RunShape, Site], dict[str, str]]] = {
    "rayjob": lambda run, site: kubernetes_files(run, site, "rayjob"),
    "raycluster": lambda run, site: kubernetes_files(run, site, "raycluster") | submit_files(run, site),
    "rayservice": lambda run, site: kubernetes_files(run, site, "rayservice"),
    "slurm": slurm_files,
    "launcher": lambda run, site: launcher_files(run, site) | submit_files(run, site),
}


def render(kind: Kind, run: RunShape, site: Site) -> dict[str, str]:
    """Return the files of ``kind`` by name. Equal arguments make equal text.

    Raises ManifestError where the run cannot lie on such a site, or a name is none that Kubernetes takes.
    """
    return _MAKERS[kind](run, site)
