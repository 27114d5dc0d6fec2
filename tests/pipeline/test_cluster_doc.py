"""Every command of docs/cluster.md is one that the program, or Ray's, takes; ports and names are those of the manifests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from cluster import ports
from cluster.manifests import KINDS, Site
from pipeline.cli import app
from pipeline.config import load_config

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
LINES = [line.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def ours(words: list[str]) -> list[str] | None:
    """Return the arguments of our program in a command, wherever it stands."""
    if words[:1] == ["kubectl"]:  # its namespace has our name
        words = words[words.index("--") + 1 :] if "--" in words else []
    for start in (["vans"], ["python", "-m", "pipeline"]):
        for at in range(len(words)):
            if words[at : at + len(start)] == start:
                return words[at + len(start) :]
    return None


COMMANDS = [found for line in LINES if (found := ours(shlex.split(line)))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_our_commands_are_taken(words: list[str]) -> None:
    command = get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    options = command.make_context("vans", words).params
    if "config" in options:
        load_config(options["config"], options["overrides"] or ())
    assert options.get("kind", KINDS[0]) in KINDS


def test_they_are_found() -> None:
    assert {words[0] for words in COMMANDS} == {"train", "data", "manifests", "status", "scale"}


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
