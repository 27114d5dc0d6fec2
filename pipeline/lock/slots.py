"""Where a lock is noted: a file in a folder, shared file systems included, or an object in a store.

A folder has operations of which one process alone can be the first: a hard link to a name (where there are none, a file that is
created and must be new), and a rename. No lock of the operating system is used, since NFS and FUSE often have none. A store has
neither. There each writes, waits for a moment, and has the lock whose note is still there.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pipeline.lock.owner import Owner
from pipeline.support.location import Uri, read_bytes, remove, write_bytes

LOCK = "run.lock"
SETTLE_S = 2.0  # longer than two starters' writes to a store can lie apart, both having found nothing there
REPLACE_SETTLE_S = 0.5


class Slot(Protocol):
    """A place for one note. OSError or StorageError where it cannot be reached."""

    def read(self) -> bytes | None:
        """Return the note, None where there is none."""

    def create(self, content: bytes) -> bool:
        """Leave the note ``content``; False where another one is there, or comes at the same time."""

    def replace(self, dead: Owner, content: bytes) -> bool:
        """Leave ``content`` in place of the note of ``dead``; False where another process does that, or has done it."""

    def overwrite(self, content: bytes) -> None:
        """Bring one's own note up to date."""

    def remove(self) -> None:
        """Take one's own note away."""


class FolderSlot:
    """The file ``run.lock`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._own: int | None = None  # descriptor of the own note: a note that took its place is never written to

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        draft, descriptor = self._draft(content)
        try:
            os.link(draft, self.path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.close(descriptor)
            return self._create_new(content)
        finally:
            draft.unlink()
        # An answer of NFS may be lost: what is there counts, not what link() said.
        return self._keep(descriptor, self.read() == content)

    def replace(self, dead: Owner, content: bytes) -> bool:
        guard = self.path.with_name(f"{LOCK}.{dead.token[:32]}")
        if not self._guarded(guard, content):
            return False
        try:
            found = self.read()
            if found is None or Owner.parse(found).token != dead.token:
                return False
            draft, descriptor = self._draft(content)
            draft.replace(self.path)
        finally:
            guard.unlink(missing_ok=True)
        time.sleep(REPLACE_SETTLE_S)  # for the case that the guard of a process that seemed dead was taken away
        found = self.read()
        mine = found is not None and Owner.parse(found).token == Owner.parse(content).token
        return self._keep(descriptor, mine)

    def overwrite(self, content: bytes) -> None:
        assert self._own is not None
        os.pwrite(self._own, content, 0)
        os.fsync(self._own)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the own note, wherever it is."""
        if self._own is not None:
            os.close(self._own)
            self._own = None

    def _guarded(self, guard: Path, content: bytes) -> bool:
        """Make the file that one process alone makes for this dead owner; one that a dead process left is taken away."""
        try:
            descriptor = os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            with suppress(FileNotFoundError):
                if Owner.parse(guard.read_bytes()).liveness() == "dead" or time.time() - guard.stat().st_mtime > 600:
                    guard.unlink()
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return True

    def _create_new(self, content: bytes) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return False
        os.write(descriptor, content)
        os.fsync(descriptor)
        return self._keep(descriptor, True)

    def _draft(self, content: bytes) -> tuple[Path, int]:
        draft = self.path.with_name(f".{LOCK}.{uuid.uuid4().hex[:12]}")
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            draft.unlink()
            raise
        return draft, descriptor

    def _keep(self, descriptor: int, mine: bool) -> bool:
        if mine:
            self.close()
            self._own = descriptor
        else:
            os.close(descriptor)
        return mine


class StoreSlot:
    """The object ``run.lock`` under a URI; a store keeps no two writers apart, so the later of two is the one."""

    def __init__(self, root: Uri) -> None:
        self.place = root / LOCK

    def __str__(self) -> str:
        return str(self.place)

    def read(self) -> bytes | None:
        try:
            return read_bytes(self.place)
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        return self.read() is None and self._write_and_look(content)

    def replace(self, dead: Owner, content: bytes) -> bool:
        found = self.read()
        return found is not None and Owner.parse(found).token == dead.token and self._write_and_look(content)

    def overwrite(self, content: bytes) -> None:
        write_bytes(self.place, content)

    def remove(self) -> None:
        remove(self.place)

    def close(self) -> None:
        """Nothing is open."""

    def _write_and_look(self, content: bytes) -> bool:
        write_bytes(self.place, content)
        time.sleep(SETTLE_S)
        return self.read() == content
