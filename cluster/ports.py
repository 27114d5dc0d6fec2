"""The ports of a Ray cluster, as Ray numbers them by default: one place, so that manifests, scripts and messages agree."""

from __future__ import annotations

GCS = 6379
"""Ray's control store, which workers and drivers join: ``host:6379``."""
DASHBOARD = 8265
"""Dashboard and job server of the head; on loopback, but for a head inside a Kubernetes network."""
CLIENT = 10001
"""Ray Client, which the head serves and a run does not use."""
METRICS = 8080
"""Prometheus metrics of each node, as KubeRay has it; elsewhere Ray takes a free port."""
SERVE = 8000
"""Ray Serve's proxy, where ``vans serve`` answers."""
