"""``ray job submit`` for a cluster that is up already, with the dashboard forwarded to this machine."""

from __future__ import annotations

import json
import shlex

from cluster import ports
from cluster.manifests.shape import STOP_WAIT_S, RunShape, Site, header


def job_environment() -> dict[str, str]:
    """Return the environment variables that a submitted run needs from its job."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}


def submit_command(run: RunShape, address: str = f"http://127.0.0.1:{ports.DASHBOARD}") -> list[str]:
    """Return the words of the command that submits ``run`` to the job server at ``address`` and follows its log.

    The code comes from the image; add ``--working-dir .`` to bring a clone along instead.
    """
    environment = json.dumps({"env_vars": job_environment()})
    return ["ray", "job", "submit", "--address", address, "--runtime-env-json", environment, "--", *run.entrypoint]


def submit_files(run: RunShape, site: Site) -> dict[str, str]:
    """Return ``submit.sh``. RAY_AUTH_MODE and the token come from the environment of whoever runs it."""
    text = f"#!/bin/bash\n{header(run, 'raycluster or launcher')}set -euo pipefail\n"
    if run.config_file is not None:
        text += f"# The configuration must lie at {site.config_path} on the head.\n"
    return {"submit.sh": f"{text}exec {shlex.join(submit_command(run))}\n"}
