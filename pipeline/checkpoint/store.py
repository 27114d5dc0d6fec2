"""Atomic checkpoint folders: a checkpoint is there whole, verified by its manifest, or it is not there.

A checkpoint is written into a hidden folder beside its place, every file and folder is flushed to the disk, and one
rename makes it visible. Its ``manifest.json`` holds size and SHA-256 of every file, so damage after the rename (a disk,
a copy cut short) is found too; reading then falls back to the one before it, and says so.

This module knows nothing of what the files mean. One process at a time writes to a root.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import CheckpointError
from pipeline.checkpoint.state import TrainState

MANIFEST = "manifest.json"
WRITING, REPLACED = ".writing-", ".replaced-"
_PROCESS = uuid.uuid4().hex[:8]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``step`` steps of ``stage`` are done; ``sequence`` counts the checkpoints of the root."""

    path: Path
    stage: str
    step: int
    sequence: int

    @property
    def state(self) -> TrainState:
        """The run's state; raises CheckpointError where the checkpoint has none."""
        return TrainState.read(self.path)


class CheckpointStore:
    """The checkpoints of one run, under ``root``; ``keep`` of each stage are kept."""

    def __init__(self, root: str | Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint per stage has to be kept")
        self.root = Path(root)
        self.keep = keep

    @contextmanager
    def write(self, stage: str, step: int, state: TrainState | None = None) -> Iterator[Path]:
        """Yield an empty folder to write into; leaving the block commits it, an exception removes it.

        ``state`` is written too where given. An earlier checkpoint of the same stage and step is replaced.
        """
        self._recover()
        final = self.root / f"{stage}-step{step:06d}"
        folder = self.root / f"{WRITING}{_PROCESS}-{final.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            if state is not None:
                state.save(folder)
            self._commit(folder, final, stage, step)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            self.prune()
        except OSError as error:  # the new one is in its place all the same
            log.warning("an old checkpoint could not be removed: %s", error)

    def latest(self, stage: str | None = None) -> Checkpoint | None:
        """Return the newest undamaged checkpoint (of ``stage``), None where there is none at all.

        A damaged one is skipped with a warning; raises CheckpointError where all are damaged.
        """
        damage = []
        for path in self.paths(stage):
            try:
                checkpoint = self.load(path)
            except CheckpointError as error:
                log.warning("skipping a damaged checkpoint: %s", error)
                damage.append(str(error))
                continue
            return checkpoint
        if damage:
            raise CheckpointError(f"no checkpoint under {self.root} can be used:\n  " + "\n  ".join(damage))
        return None

    def load(self, path: str | Path) -> Checkpoint:
        """Verify the checkpoint at ``path`` against its manifest and return it; raises CheckpointError."""
        path = Path(path)
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            file = path / name
            try:
                if not file.is_file():
                    raise CheckpointError(f"{path}: {name} is missing")
                if not file.resolve().is_relative_to(path.resolve()):
                    raise CheckpointError(f"{path}: {name} is a link that leads out of the checkpoint")
            except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
                raise CheckpointError(f"{path}: {name[:100]} is not a usable path: {error}") from error
            if file.stat().st_size != entry["size"]:
                raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes, the manifest {entry['size']}")
            if _sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{path}: {name} differs from what was written (SHA-256)")
        return Checkpoint(path, manifest["stage"], manifest["step"], manifest["sequence"])

    def paths(self, stage: str | None = None) -> list[Path]:
        """Folders of the checkpoints (of ``stage``), newest first, unverified."""
        if not self.root.is_dir():
            return []
        ranked = []
        for path in self.root.iterdir():
            name, _, step = path.name.rpartition("-step")
            if path.is_dir() and not path.name.startswith(".") and step.isdigit() and stage in (None, name):
                sequence = _sequence(path)
                # One whose manifest is damaged is tried first, so that whoever resumes is told about it.
                ranked.append((sequence is None, sequence or 0, int(step), path))
        return [entry[-1] for entry in sorted(ranked, reverse=True)]

    def prune(self) -> list[Path]:
        """Remove all but the newest ``keep`` checkpoints of each stage; returns what was removed.

        One with a damaged manifest neither counts nor goes: it is left for a person to look at.
        """
        removed = []
        for stage in {path.name.rpartition("-step")[0] for path in self.paths()}:
            readable = [path for path in self.paths(stage) if _sequence(path) is not None]
            for path in readable[self.keep :]:
                shutil.rmtree(path)
                removed.append(path)
        return removed

    def _commit(self, folder: Path, final: Path, stage: str, step: int) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "stage": stage,
            "step": step,
            "sequence": 1 + max((_sequence(path) or 0 for path in self.paths()), default=0),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {
                path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
                for path in files
            },
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
            _flush(path)
        replaced = self.root / f"{REPLACED}{final.name}"
        if final.exists():
            final.rename(replaced)
        folder.rename(final)
        _flush(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _recover(self) -> None:
        """Clear what a killed writer left: half-written folders go, a checkpoint moved aside comes back."""
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            if path.name.startswith(WRITING) and not path.name.startswith(WRITING + _PROCESS):
                log.warning("removing a half-written checkpoint: %s", path)
                shutil.rmtree(path)
            elif path.name.startswith(REPLACED):
                final = self.root / path.name.removeprefix(REPLACED)
                if final.exists():
                    shutil.rmtree(path)
                else:
                    path.rename(final)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint folder")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = {key: manifest[key] for key in ("stage", "step", "sequence", "files")}
        _check(found)
        return found
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}, so it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error})") from error


def _check(manifest: dict[str, Any]) -> None:
    """Raise ValueError or KeyError where a value is of the wrong type, or a file lies outside the checkpoint."""
    if not isinstance(manifest["stage"], str) or not isinstance(manifest["files"], dict):
        raise ValueError("stage must be text, and files an object")
    for key in ("step", "sequence"):
        if type(manifest[key]) is not int or manifest[key] < 0:
            raise ValueError(f"{key} must be a whole number from 0")
    for name, entry in manifest["files"].items():
        relative = PurePosixPath(name)
        if not name or relative.is_absolute() or ".." in relative.parts or "\0" in name or "\\" in name:
            raise ValueError(f"{name[:100]!r} is no path inside the checkpoint")
        if not isinstance(entry, dict) or type(entry["size"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError(f"{name[:100]!r} has no size and sha256")


def _sequence(path: Path) -> int | None:
    """The checkpoint's place in the order of writing; None where the manifest cannot say."""
    try:
        return int(_read_manifest(path)["sequence"])
    except CheckpointError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
