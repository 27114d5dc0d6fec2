"""Atomic checkpoint folders: a checkpoint is there whole, verified by its manifest, or it is not there.

A checkpoint is written into a hidden folder beside its place, every file and folder is flushed to the disk, and one
rename makes it visible. Its ``manifest.json`` holds size and SHA-256 of every file, so damage after the rename (a disk,
a copy cut short) is found too; reading then falls back to the one before it, and says so.

This module knows nothing of what the files mean. One process at a time writes to a root: ``pipeline.lock`` sees to that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
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
    """The checkpoints of one run, under ``root``; ``keep`` of each stage are kept, and those that are ``in_use``.

    ``require_owned`` raises where the root is not this process's any more; then nothing in it is touched.
    """

    def __init__(
        self,
        root: str | Path,
        keep: int = 3,
        in_use: Collection[Path] = (),
        require_owned: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint per stage has to be kept")
        self.root = Path(root)
        self.keep = keep
        self.in_use = in_use
        self.best: Path | None = None  # stays, beside the newest ones
        self._require_owned = require_owned

    @contextmanager
    def write(self, stage: str, step: int, state: TrainState | None = None) -> Iterator[Path]:
        """Yield an empty folder to write into; leaving the block commits it, an exception removes it.

        ``state`` is written too where given. An earlier checkpoint of the same stage and step is replaced.
        """
        self._require_owned()
        self._recover()
        final = self.root / f"{stage}-step{step:06d}"
        folder = self.root / f"{WRITING}{_PROCESS}-{final.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            if state is not None:
                state.save(folder)
            self._require_owned()
            self._commit(folder, final, stage, step)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            self.prune()
        except OSError as error:  # the new one is in its place all the same
            log.warning("an old checkpoint could not be removed: %s", error)

    @contextmanager
    def receive(self, name: str) -> Iterator[Path]:
        """Yield an empty folder for a copy of the checkpoint ``name``; leaving the block verifies the copy and puts it in its place.

        Raises CheckpointError where the copy is not whole; then, as after any exception, it is removed.
        """
        self._recover()
        folder = self.root / f"{WRITING}{_PROCESS}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            self.load(folder)
            self._place(folder, self.root / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

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
        manifest = read_manifest(path)
        verify(path, manifest["files"])
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
        """Remove all but the newest ``keep`` checkpoints of each stage, and the best; returns what was removed.

        One with a damaged manifest neither counts nor goes: it is left for a person to look at.
        """
        removed = []
        for stage in {path.name.rpartition("-step")[0] for path in self.paths()}:
            readable = [path for path in self.paths(stage) if _sequence(path) is not None]
            for path in readable[self.keep :]:
                if path in self.in_use or path == self.best:
                    continue
                shutil.rmtree(path)
                removed.append(path)
        return removed

    def _commit(self, folder: Path, final: Path, stage: str, step: int) -> None:
        manifest = {
            "stage": stage,
            "step": step,
            "sequence": 1 + max((_sequence(path) or 0 for path in self.paths()), default=0),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": contents(folder),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        self._place(folder, final)

    def _place(self, folder: Path, final: Path) -> None:
        """Flush ``folder`` to the disk and make it ``final`` by a rename."""
        for path in (*sorted(folder.rglob("*")), folder):
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


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file in ``folder``, by its path in there: a manifest's ``files``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError unless ``folder`` holds the ``files`` of a manifest as they were written."""
    for name, entry in files.items():
        file = folder / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{folder}: {name} is missing")
            if not file.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(f"{folder}: {name} is a link that leads out of the checkpoint")
        except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
            raise CheckpointError(f"{folder}: {name[:100]} is not a usable path: {error}") from error
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(f"{folder}: {name} has {file.stat().st_size} bytes, the manifest {entry['size']}")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} differs from what was written (SHA-256)")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return stage, step, sequence and files of the checkpoint at ``path``; raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint folder")
    try:
        return parse_manifest((path / MANIFEST).read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}, so it was not written to its end") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error})") from error


def parse_manifest(content: bytes, where: object) -> dict[str, Any]:
    """Return stage, step, sequence and files of a manifest; raises CheckpointError where one is not what it has to be.

    No name of a file leads out of the folder that the manifest lies in.
    """
    try:
        manifest = json.loads(content.decode("utf-8"))
        found = {key: manifest[key] for key in ("stage", "step", "sequence", "files")}
        _check(found)
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: {MANIFEST} cannot be read ({error})") from error


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
        return int(read_manifest(path)["sequence"])
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
