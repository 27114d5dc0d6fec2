"""KubeRay's RayJob, RayCluster and RayService for a run, with the claim for its storage and a network policy. KubeRay 1.6 or newer.

Each group of the run has a worker group of its own, whose pods carry just what its members ask for, so that it scales by itself.
Secrets are named, never written.
"""

from __future__ import annotations

import shlex
from typing import Any, Literal

import yaml

from cluster import ports
from cluster.manifests.shape import Group, Pods, RunShape, Site, fold, header, node_labels, ray_version
from cluster.manifests.submit import job_environment
from cluster.variables import SERVE_TOKEN

GPU = "nvidia.com/gpu"
PART_OF = {"app.kubernetes.io/part-of": "vans"}
"""Label of every pod of a run, whichever RayCluster it belongs to."""

_USER = 1000  # the image's
_OVERHEAD_CPUS = 1  # for the raylet and its agents, which Ray does not count
_IDLE_S = 300


def kubernetes_files(run: RunShape, site: Site, kind: Literal["rayjob", "raycluster", "rayservice"]) -> dict[str, str]:
    """Return ``<kind>.yaml``, ``storage.yaml`` and ``network.yaml``."""
    make = {"rayjob": ray_job, "raycluster": ray_cluster, "rayservice": ray_service}[kind]
    documents = [config_map(run, site)] if run.config_file is not None else []
    documents.append(make(run, site))
    return {
        f"{kind}.yaml": header(run, kind) + _dump(documents),
        "storage.yaml": header(run, kind) + _dump([claim(site)]),
        "network.yaml": header(run, kind) + _dump([network_policy(site, serves=kind == "rayservice")]),
    }


def ray_job(run: RunShape, site: Site) -> dict[str, Any]:
    """Return the RayJob: a cluster, the run on it, and the end of the cluster.

    After a failure that takes the driver along, KubeRay makes a new cluster, up to ``site.retries`` times, and the
    entrypoint goes on from the run's newest checkpoint on the shared storage.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(run.slug, site),
        "spec": {
            "entrypoint": shlex.join(run.entrypoint),
            "submissionMode": "K8sJobMode",
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": job_environment()}),
            "backoffLimit": site.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": cluster_spec(run, site),
        },
    }


def ray_cluster(run: RunShape, site: Site) -> dict[str, Any]:
    """Return the RayCluster alone, which stays up and takes jobs."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(run.slug, site),
        "spec": cluster_spec(run, site),
    }


def ray_service(run: RunShape, site: Site) -> dict[str, Any]:
    """Return the RayService: a cluster with the server on it. KubeRay makes a new one beside it where the file changes.

    The proxy stands on the head, and ``<name>-serve-svc`` leads to it. People need the token in ``site.serve_secret``.
    """
    serving = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": ports.SERVE},  # noqa: S104 - inside the pod network, behind a token
        "applications": [{"name": "vans", "route_prefix": "/", **(run.application or {})}],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": _metadata(run.slug, site),
        "spec": {
            "serveConfigV2": yaml.safe_dump(serving, sort_keys=False, width=120),
            "rayClusterConfig": cluster_spec(run, site),
        },
    }


def cluster_spec(run: RunShape, site: Site) -> dict[str, Any]:
    """Return the RayClusterSpec: a head without GPUs for the driver, and a worker group for each group of the run."""
    return {
        "rayVersion": ray_version(),
        "authOptions": {"mode": "token", "secretName": site.token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE_S,
            "imagePullPolicy": "IfNotPresent",
            "resources": {key: {"cpu": "500m", "memory": "1Gi"} for key in ("requests", "limits")},
        },
        "headGroupSpec": _head(run, site),
        "workerGroupSpecs": [_worker_group(run, group, site) for group in run.groups],
    }


def claim(site: Site) -> dict[str, Any]:
    """Return the claim for storage that every pod writes to; the cluster's default StorageClass must offer ReadWriteMany."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(site.claim, site),
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": site.storage}}},
    }


def network_policy(site: Site, *, serves: bool = False) -> dict[str, Any]:
    """Return the policy that lets only the run's own pods reach its pods; what ``serves`` is reached by others too, behind its token.

    torch.distributed's rendezvous, NCCL and vLLM between GPUs ask for no token (docs/security.md). The job server does, so
    KubeRay's operator and its submitter may reach it; metrics are read-only.
    """
    guarded = [{"protocol": "TCP", "port": port} for port in (ports.DASHBOARD, ports.METRICS)]
    guarded += [{"protocol": "TCP", "port": ports.SERVE}] if serves else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata("vans-private", site),
        "spec": {
            "podSelector": {"matchLabels": dict(PART_OF)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": dict(PART_OF)}}]},
                {"from": [{"namespaceSelector": {}}], "ports": guarded},
            ],
        },
    }


def config_map(run: RunShape, site: Site) -> dict[str, Any]:
    """Return the ConfigMap that carries the run's configuration where the image has none."""
    name = site.config_path.rpartition("/")[2]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{run.slug}-config", site),
        "data": {name: run.config_file or ""},
    }


def _head(run: RunShape, site: Site) -> dict[str, Any]:
    cpus = max(1, round(run.driver_cpus + 0.4999))
    container = {
        "name": "ray-head",
        "ports": [
            {"name": "gcs-server", "containerPort": ports.GCS},
            {"name": "dashboard", "containerPort": ports.DASHBOARD},
            {"name": "client", "containerPort": ports.CLIENT},
            {"name": "metrics", "containerPort": ports.METRICS},
            *([{"name": "serve", "containerPort": ports.SERVE}] if run.application else []),
        ],
        # The driver alone logs to MLflow; a server has none.
        "env": [*_environment(run, site), *([] if run.application else _mlflow(site))],
        "resources": _pod_resources(cpus + 2, site.head_memory_gib, 0),
    }
    return {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",  # noqa: S104 - inside the pod network, behind the token and the network policy
            "metrics-export-port": str(ports.METRICS),
            "disable-usage-stats": "true",
        },
        "resources": {"CPU": str(cpus)},
        "template": _template(run, site, container, gpus=0),
    }


def _worker_group(run: RunShape, group: Group, site: Site) -> dict[str, Any]:
    pods = fold(group, site.gpus_per_node, site.growth)
    gpus = int(pods.resources.get("GPU", 0))
    container = {
        "name": "ray-worker",
        "ports": [{"name": "metrics", "containerPort": ports.METRICS}],
        "env": _environment(run, site),
        "resources": _pod_resources(int(pods.resources["CPU"]) + _OVERHEAD_CPUS, _memory(pods, site), gpus),
    }
    spec: dict[str, Any] = {
        "groupName": _group_name(group),
        "replicas": pods.count,
        "minReplicas": pods.count,
        "maxReplicas": pods.most,
        "rayStartParams": {"metrics-export-port": str(ports.METRICS), "disable-usage-stats": "true"},
        "resources": {key: f"{amount:g}" for key, amount in pods.resources.items()},
        "template": _template(run, site, container, gpus=gpus),
    }
    labels = node_labels(group)
    return spec | ({"labels": labels} if labels else {})


def _template(run: RunShape, site: Site, container: dict[str, Any], *, gpus: int) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "shared", "persistentVolumeClaim": {"claimName": site.claim}}]
    mounts = [{"name": "shared", "mountPath": site.shared}]
    if run.config_file is not None:
        folder = site.config_path.rpartition("/")[0]
        volumes.append({"name": "config", "configMap": {"name": f"{run.slug}-config"}})
        mounts.append({"name": "config", "mountPath": folder})
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "enableServiceLinks": False,  # a Service called vllm would set VLLM_PORT
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER},
        "containers": [
            {
                **container,
                "image": site.image,
                "imagePullPolicy": "IfNotPresent",
                "securityContext": {"allowPrivilegeEscalation": False},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if gpus:
        spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": dict(PART_OF)}, "spec": spec}


def _environment(run: RunShape, site: Site) -> list[dict[str, Any]]:
    served = _secret(SERVE_TOKEN, site.serve_secret, "token", optional=False)
    return [
        *([served] if run.application else []),
        {"name": "HF_HOME", "value": f"{site.shared}/hub"},
        {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
        _secret("HF_TOKEN", site.hub_secret, "token"),
    ]


def _mlflow(site: Site) -> list[dict[str, Any]]:
    return [
        _secret("MLFLOW_TRACKING_URI", site.mlflow_secret, "uri"),
        _secret("MLFLOW_TRACKING_USERNAME", site.mlflow_secret, "username"),
        _secret("MLFLOW_TRACKING_PASSWORD", site.mlflow_secret, "password"),
    ]


def _secret(variable: str, name: str, key: str, *, optional: bool = True) -> dict[str, Any]:
    """Return a variable whose value is in a Secret; without that Secret it is not set, or the pod does not start."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key, "optional": optional}}}


def _pod_resources(cpus: int, memory_gib: int, gpus: int) -> dict[str, Any]:
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"} | ({GPU: str(gpus)} if gpus else {})
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _memory(pods: Pods, site: Site) -> int:
    gpus = int(pods.resources.get("GPU", 0))
    return gpus * site.memory_per_gpu_gib if gpus else int(pods.resources["CPU"]) * site.memory_per_cpu_gib


def _group_name(group: Group) -> str:
    return group.name.lower().replace(" ", "-").replace("_", "-")


def _metadata(name: str, site: Site) -> dict[str, Any]:
    return {"name": name, "namespace": site.namespace, "labels": dict(PART_OF)}


class _Dumper(yaml.SafeDumper):
    """Writes equal parts out instead of as anchors and aliases, which people do not expect in manifests."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def _dump(documents: list[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
