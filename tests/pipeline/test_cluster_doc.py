"""Every command of Ray's in docs/cluster.md is one that it takes; ports and names are those of the manifests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from cluster import ports
from cluster.manifests import Site

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
LINES = [line.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def test_rays_commands_are_taken() -> None:
    from ray.scripts.scripts import cli

    seen = set()
    for words in (shlex.split(line) for line in LINES if line.startswith("ray ")):
        command, rest = cli, words[1:]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        rest = rest[: rest.index("--")] if "--" in rest else rest
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, f"{shlex.join(words)}: {word}"
        seen.add(command.name)
    assert {"start", "submit", "up", "down", "dashboard"} <= seen


def test_secrets_files_and_ports_have_the_manifests_names() -> None:
    site = Site()
    for secret, key in ((site.token_secret, "auth_token"), (site.hub_secret, "token"), (site.mlflow_secret, "uri")):
        assert re.search(rf"secret generic {secret} --from-(file|literal)={key}=", TEXT)
    assert f"--port={ports.GCS} --dashboard-host=127.0.0.1 --dashboard-port={ports.DASHBOARD}" in TEXT
    examples = Path(__file__).resolve().parents[2] / "cluster" / "manifests" / "examples"
    job = yaml.safe_load((examples / "vans_8gpu" / "rayjob.yaml").read_text())
    assert f"get rayjob {job['metadata']['name']}\n" in TEXT
    assert f"create namespace {job['metadata']['namespace']}\n" in TEXT
    assert all(f"slurm/{path.name}" in TEXT for path in (examples / "vans_2node").glob("*.sbatch"))
