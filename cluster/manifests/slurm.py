"""A Slurm script for a run: it brings a Ray cluster up on the nodes of the job, with a token of its own, and the driver on it.

All nodes of the job are alike. The script itself is ``slurm.template``; it is filled in here.
"""

from __future__ import annotations

import math
import shlex
import string
from collections.abc import Mapping
from pathlib import Path

from cluster import ports
from cluster.manifests.shape import STOP_WAIT_S, Group, ManifestError, RunShape, Site, header, shared_labels

_TEMPLATE = Path(__file__).with_name("slurm.template")
_OVERHEAD_CPUS = 2  # for Ray's own processes, MLflow and the driver
_EPSILON = 1e-4


class _Template(string.Template):
    delimiter = "%%"  # $ and @ are bash's


def slurm_files(run: RunShape, site: Site) -> dict[str, str]:
    """Return ``<run>.sbatch``."""
    if run.config_file is not None:
        raise ManifestError(
            "a Slurm job reads its configuration from a path that all nodes see: give vans manifests the file by that path"
        )
    nodes = pack(run.groups, site.gpus_per_node)
    gpus = site.gpus_per_node if any(group.gpus for group in run.groups) else 0
    cpus = math.ceil(max(node.get("CPU", 0.0) for node in nodes) + run.driver_cpus - _EPSILON) + _OVERHEAD_CPUS
    labels = ",".join(f"{key}={value}" for key, value in sorted(shared_labels(run.groups).items()))
    custom = {key: math.ceil(max(node.get(key, 0.0) for node in nodes)) for node in nodes for key in node}
    custom = {key: amount for key, amount in custom.items() if key not in ("CPU", "GPU")}
    flags = [f"--labels={labels}"] if labels else []
    flags += [f"--resources={_json(custom)}"] if custom else []
    text = _Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        header=header(run, "slurm").rstrip(),
        name=run.slug,
        nodes=len(nodes),
        cpus=cpus,
        gpus=gpus,
        gpus_line=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
        time=site.time_limit,
        grace=STOP_WAIT_S,
        shared=shlex.quote(site.shared),
        gcs=ports.GCS,
        dashboard=ports.DASHBOARD,
        client=ports.CLIENT,
        node_flags=shlex.join(flags),
        entrypoint=shlex.join(run.entrypoint),
    )
    return {f"{run.slug}.sbatch": text}


def pack(groups: tuple[Group, ...], gpus_per_node: int) -> list[dict[str, float]]:
    """Return what lies on each node when the groups' members are put on as few equal nodes as first fit finds.

    Only GPUs limit a node: CPUs are asked of Slurm as they are needed. Raises ManifestError where a member, or members
    that must share a node, need more GPUs than a node has.
    """
    pieces: list[tuple[str, Mapping[str, float]]] = []
    for group in groups:
        together = group.strategy == "STRICT_PACK"
        size = group.gpus * (group.count if together else 1)
        if size > gpus_per_node + _EPSILON:
            what = f"{group.count} {group.name} on one node (STRICT_PACK)" if together else f"one {group.name}"
            raise ManifestError(f"{what} needs {size:g} GPUs, and a node has {gpus_per_node} (--gpus-per-node)")
        if together:
            pieces.append((group.name, {key: amount * group.count for key, amount in group.bundle.items()}))
        else:
            pieces += [(group.name, group.bundle)] * group.count
    pieces.sort(key=lambda piece: -piece[1].get("GPU", 0.0))  # stable: otherwise in the order of the run
    spread = {group.name for group in groups if group.strategy == "STRICT_SPREAD"}
    nodes: list[dict[str, float]] = [{}]
    tenants: list[set[str]] = [set()]
    for name, bundle in pieces:
        place = next(
            (
                i
                for i, node in enumerate(nodes)
                if _gpus_with(node, bundle) <= gpus_per_node + _EPSILON and not (name in spread and name in tenants[i])
            ),
            None,
        )
        if place is None:
            place = len(nodes)
            nodes.append({})
            tenants.append(set())
        tenants[place].add(name)
        for key, amount in bundle.items():
            nodes[place][key] = nodes[place].get(key, 0.0) + amount
    return nodes


def _gpus_with(node: Mapping[str, float], bundle: Mapping[str, float]) -> float:
    return node.get("GPU", 0.0) + bundle.get("GPU", 0.0)


def _json(amounts: Mapping[str, float]) -> str:
    return "{" + ", ".join(f'"{key}": {amount:g}' for key, amount in sorted(amounts.items())) + "}"
