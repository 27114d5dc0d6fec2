"""A file for Ray's cluster launcher (``ray up``): machines that are there already and take ssh, all alike, the run's image on each."""

from __future__ import annotations

from typing import Any

import yaml

from cluster import ports
from cluster.manifests.shape import RunShape, Site, header, shared_labels
from cluster.manifests.slurm import pack

TOKEN = "~/.ray/auth_token"  # noqa: S105 - where Ray looks for it by itself
ENVIRONMENT = "/etc/vans/env"
"""A file on each machine, ``NAME=value`` a line, with the secrets of the run: HF_TOKEN, MLFLOW_TRACKING_…."""


def launcher_files(run: RunShape, site: Site) -> dict[str, str]:
    """Return ``cluster.yaml``."""
    text = header(run, "launcher") + "# Fill in: provider.head_ip, provider.worker_ips, auth.\n"
    return {"cluster.yaml": text + yaml.safe_dump(cluster_config(run, site), sort_keys=False, width=120)}


def cluster_config(run: RunShape, site: Site) -> dict[str, Any]:
    """Return the launcher's configuration, with ``HEAD_IP``, ``WORKER_n_IP`` and ``USER`` to be filled in."""
    workers = len(pack(run.groups, site.gpus_per_node)) - 1
    labels = ",".join(f"{key}={value}" for key, value in sorted(shared_labels(run.groups).items()))
    flags = "--disable-usage-stats" + (f" --labels={labels}" if labels else "")
    return {
        "cluster_name": run.slug,
        "provider": {
            "type": "local",
            "head_ip": "HEAD_IP",
            "worker_ips": [f"WORKER_{i}_IP" for i in range(1, workers + 1)],
        },
        "auth": {"ssh_user": "USER", "ssh_private_key": "~/.ssh/id_ed25519"},
        "min_workers": workers,
        "max_workers": workers,
        "docker": {
            "image": site.image,
            "container_name": "vans",
            "pull_before_run": True,
            "run_options": [
                "--ulimit nofile=65536:65536",
                "--env RAY_AUTH_MODE=token",
                f"--env HF_HOME={site.shared}/hub",
                f"--env-file {ENVIRONMENT}",
                f"--volume {site.shared}:{site.shared}",
            ],
        },
        "file_mounts": {TOKEN: TOKEN},
        "head_start_ray_commands": [
            "ray stop",
            f"ray start --head --port={ports.GCS} --dashboard-host=127.0.0.1 --dashboard-port={ports.DASHBOARD} "
            f"--ray-client-server-port={ports.CLIENT} --autoscaling-config=~/ray_bootstrap_config.yaml {flags}",
        ],
        "worker_start_ray_commands": ["ray stop", f"ray start --address=$RAY_HEAD_IP:{ports.GCS} {flags}"],
    }
