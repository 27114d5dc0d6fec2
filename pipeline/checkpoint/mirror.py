"""A second home of a run's checkpoints and exports: a store such as S3, which outlives the machine.

A store has no rename that makes a folder visible at once. So the manifest is what makes a checkpoint: it is written after all
files and removed before the first of them, and a folder without one is not there. Names are those of the run's own folder
(``checkpoints/<stage>-step<n>/``, ``vlm_adapter/`` …). Nothing is restored that differs from its manifest.

One run at a time writes to a mirror (``pipeline.lock``). When to send what is ``uploads``'.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError, StorageError
from pipeline.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, contents, parse_manifest, verify
from pipeline.support.location import Uri, download, listing, read_bytes, remove, upload, write_bytes

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
_NAME = re.compile(r"[A-Za-z0-9_-]+-step[0-9]+")

log = logging.getLogger(__name__)


class ChangedError(CheckpointError):
    """A folder changed, or went, while it was being sent; nothing is wrong with the store."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint in a mirror that has a manifest; ``files`` are the manifest's."""

    name: str
    sequence: int
    files: dict[str, dict[str, Any]]


class Mirror:
    """Checkpoints and exports of one run under ``root``; ``keep`` checkpoints of each stage are kept."""

    def __init__(self, root: Path | Uri, keep: int = 3) -> None:
        self.root, self.keep = root, keep
        self.best = ""  # name of the checkpoint that stays beside the newest ones

    def require_unused(self) -> None:
        """Raise ConfigError where the mirror already holds checkpoints; StorageError where it cannot be read."""
        if any(_NAME.fullmatch(info.base_name) for info in self._listed()):
            raise ConfigError(
                f"checkpoint.mirror={self.root} already holds a run; continue it with --resume, or choose another place"
            )

    def describe(self, config: str) -> None:
        """Write the run's configuration, YAML, beside its checkpoints: the first proof that the mirror can be written to."""
        try:
            write_bytes(self.root / CONFIG, config.encode())
        except StorageError as error:
            raise StorageError(f"checkpoint.mirror: {error}") from error

    # --- reading ----------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Stored]:
        """Return the checkpoints that have a readable manifest, newest first; raises StorageError."""
        return self._survey()[0]

    def restore(self, stored: Stored, store: CheckpointStore) -> Checkpoint:
        """Copy a checkpoint into ``store``, verified; raises CheckpointError where it is not what its manifest says."""
        with store.receive(stored.name) as folder:
            self._fetch(self.root / CHECKPOINTS / stored.name, stored.files, folder)
            (folder / MANIFEST).write_bytes(read_bytes(self.root / CHECKPOINTS / stored.name / MANIFEST))
        return store.load(store.root / stored.name)

    def restore_export(self, name: str, out: Path) -> bool:
        """Copy the export ``name`` to the folder ``out``, verified, in place of what is there; False where there is none.

        Raises CheckpointError where it is damaged.
        """
        try:
            manifest = parse_manifest(read_bytes(self.root / name / MANIFEST), self.root / name)
        except FileNotFoundError:
            return False
        folder = out.with_name(f".{out.name}.restoring")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            self._fetch(self.root / name, manifest["files"], folder)
            verify(folder, manifest["files"])
            shutil.rmtree(out, ignore_errors=True)
            folder.rename(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _fetch(self, source: Path | Uri, files: dict[str, dict[str, Any]], folder: Path) -> None:
        for name, entry in files.items():
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                copied = download(_below(source, name), path, entry["size"])
            except FileNotFoundError:
                raise CheckpointError(f"{source}: {name} is missing") from None
            except ValueError as error:  # a name that no file of this machine can have
                raise CheckpointError(f"{source}: {name[:100]!r}: {error}") from error
            if copied != entry["size"]:
                raise CheckpointError(f"{source}: {name} has not the {entry['size']} bytes of the manifest")

    # --- writing ----------------------------------------------------------------------------------------------------

    def send(self, path: Path, check: Callable[[], None]) -> None:
        """Upload the checkpoint at ``path`` and remove the mirror's old ones; ``check`` is called at every chunk and may raise.

        Raises StorageError, and ChangedError where ``path`` is not (any more) what its manifest says.
        """
        try:
            manifest = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise ChangedError(f"{path}: {error}") from error
        self._put(path, CHECKPOINTS, manifest, parse_manifest(manifest, path)["files"], check)
        self._prune(path.name)

    def send_export(self, path: Path, check: Callable[[], None]) -> None:
        """Upload the export at ``path``, with a manifest; errors as :meth:`send`."""
        try:
            files = contents(path)
        except OSError as error:
            raise ChangedError(f"{path}: {error}") from error
        manifest = {"stage": path.name, "step": 0, "sequence": 0, "files": files}
        self._put(path, "", (json.dumps(manifest, indent=1) + "\n").encode(), files, check)

    def _put(self, path: Path, parent: str, manifest: bytes, files: Iterable[str], check: Callable[[], None]) -> None:
        target = (self.root / parent if parent else self.root) / path.name
        expected = parse_manifest(manifest, path)["files"]
        try:
            if read_bytes(target / MANIFEST) == manifest:
                return  # it is there
            remove(target / MANIFEST)
        except FileNotFoundError:
            pass
        remove(target, folder=True)  # what an upload left that was cut short
        for name in files:
            digest = hashlib.sha256()

            def seen(chunk: bytes, digest: Any = digest) -> None:
                check()
                digest.update(chunk)

            check()
            try:
                upload(path / name, _below(target, name), seen)
            except OSError as error:
                raise ChangedError(f"{path / name}: {error}") from error
            if digest.hexdigest() != expected[name]["sha256"]:
                raise ChangedError(f"{path / name} is not what the manifest says (SHA-256)")
        check()
        write_bytes(target / MANIFEST, manifest)

    def _prune(self, newest: str) -> None:
        """Remove all but the newest ``keep`` checkpoints of each stage and the best, and uploads that were cut short.

        One with a damaged manifest stays, for a person to look at.
        """
        whole, halves = self._survey()
        kept: dict[str, int] = {}
        for stored in whole:
            stage = stored.name.rpartition("-step")[0]
            kept[stage] = kept.get(stage, 0) + 1
            if kept[stage] > self.keep and stored.name not in (newest, self.best):
                halves.append(stored.name)
        for name in halves:
            place = self.root / CHECKPOINTS / name
            remove(place / MANIFEST)
            remove(place, folder=True)

    def _survey(self) -> tuple[list[Stored], list[str]]:
        """Return the checkpoints with a readable manifest, newest first, and the names of those without any."""
        whole, halves = [], []
        for info in self._listed():
            name = info.base_name
            if not _NAME.fullmatch(name):
                continue
            place = self.root / CHECKPOINTS / name
            try:
                manifest = parse_manifest(read_bytes(place / MANIFEST), place)
            except FileNotFoundError:
                halves.append(name)
            except CheckpointError as error:
                log.warning("skipping a damaged checkpoint: %s", error)
            else:
                whole.append(Stored(name, manifest["sequence"], manifest["files"]))
        return sorted(whole, key=lambda stored: stored.sequence, reverse=True), halves

    def _listed(self) -> list[Any]:
        try:
            return listing(self.root / CHECKPOINTS)
        except StorageError as error:
            raise StorageError(f"checkpoint.mirror: {error}") from error


def newest_of_both(store: CheckpointStore, mirror: Mirror, exports: Iterable[str]) -> Checkpoint | None:
    """Return the newest whole checkpoint of ``store`` and ``mirror``, None where neither has one.

    The mirror's is taken where it was written later than the store's, and copied into it; with it come the ``exports``, which an
    earlier stage may have made. A damaged one is skipped with a warning. Raises CheckpointError where all are damaged,
    StorageError where the mirror does not answer.
    """
    damage = []
    try:
        local = store.latest()
    except CheckpointError as error:
        local = None
        damage.append(str(error))
    out = store.root.parent
    for stored in mirror.checkpoints():
        if local is not None and stored.sequence <= local.sequence:
            break
        try:
            found = mirror.restore(stored, store)
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint of the mirror: %s", error)
            damage.append(str(error))
            continue
        for name in exports:
            mirror.restore_export(name, out / name)
        return found
    if local is None and damage:
        raise CheckpointError(f"no checkpoint of {store.root} or {mirror.root} can be used:\n  " + "\n  ".join(damage))
    for name in exports:
        if local is not None and not (out / name).exists():
            mirror.restore_export(name, out / name)
    return local


def _below(place: Path | Uri, name: str) -> Path | Uri:
    for part in name.split("/"):
        place = place / part
    return place
