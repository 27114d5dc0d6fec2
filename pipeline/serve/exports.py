"""What a run has exported: its configuration, and the newest weights of each model that a server can take.

A folder counts from the moment that the file written last is in it. Nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.weights.files import CONFIG, MODELS
from cluster.errors import CheckpointError
from pipeline.checkpoint import CheckpointStore
from pipeline.config import RunConfig, load_config
from pipeline.run.learners import export_name
from pipeline.stages.question import split_model

Policy = Literal["vlm", "vdm"]
POLICIES: tuple[Policy, Policy] = ("vlm", "vdm")


@dataclass(frozen=True, order=True)
class Export:
    """Weights in ``folder``, an adapter or a whole model, that were complete at ``written`` (ns since the epoch)."""

    written: int
    folder: Path


def run_config(run: Path, overrides: list[str]) -> RunConfig:
    """Return the configuration of the run in ``run``; raises CheckpointError for a folder that is none."""
    file = run / "config.yaml"
    if not file.is_file():
        raise CheckpointError(
            f"{run} is no run's folder: there is no config.yaml in it. Give the folder that vans train wrote to"
        )
    return load_config(file, overrides)


def newest_export(config: RunConfig, run: Path, policy: Policy) -> Export | None:
    """Return the newest weights of ``policy`` in the folder ``run``: the run's export, or a checkpoint's."""
    return max(_exports(config, run, policy), default=None)


def _exports(config: RunConfig, run: Path, policy: Policy) -> Iterator[Export]:
    name = export_name(config, policy)
    for holder in (run, *CheckpointStore(run / "checkpoints", config.checkpoint.keep).paths()):
        for marker in (CONFIG, *MODELS, *(f"{model}.index.json" for model in MODELS)):
            try:
                written = (holder / name / marker).stat().st_mtime_ns
            except OSError:
                continue
            yield Export(written, holder / name)
            break


def with_models(config: RunConfig, vlm: str | None, vdm: str | None) -> RunConfig:
    """Return ``config`` with the models that were given, whole models or adapters of its own; CheckpointError for others."""
    chosen: dict[str, str | None] = {}
    for policy, given in (("vlm", vlm), ("vdm", vdm)):
        chosen[policy], chosen[f"{policy}_adapter"] = split_model(config, policy, given)  # type: ignore[arg-type]
    return config.model_copy(update={"models": config.models.model_copy(update=chosen)})


def of_run(config: RunConfig, run: Path) -> tuple[RunConfig, dict[Policy, Export]]:
    """Return the configuration that serves what ``run`` has exported, and which exports these are.

    A model that has not been trained yet is served as the run began with it. Raises CheckpointError where neither has been.
    """
    found = {policy: export for policy in POLICIES if (export := newest_export(config, run, policy)) is not None}
    if not found:
        names = " nor ".join(export_name(config, policy) for policy in POLICIES)
        raise CheckpointError(
            f"{run} has not exported anything yet: neither {names} is in it or in one of its checkpoints. Wait for its first "
            f"checkpoint (checkpoint.every), or serve the pair that it began with: vans serve --config {run / 'config.yaml'}"
        )
    given = {policy: str(export.folder) for policy, export in found.items()}
    return with_models(config, given.get("vlm"), given.get("vdm")), found
