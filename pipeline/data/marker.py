"""Whether a dataset folder is whole: what its writer notes while it works, and what it leaves at its end.

``_writing.json`` is there before the first shard; ``_complete.json`` is written last and names every shard. A write that was
interrupted leaves the first one, so its part is not taken for the whole. A folder with neither was written by other means.
Readers of Parquet folders pass over names that begin with an underscore or a dot.
Not responsible for the shards (``schema``) or for what a reader makes of the markers (``folder``).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cluster.errors import DataError, VansError
from pipeline.support.location import Uri, read_bytes, remove, write_bytes

WRITING = "_writing.json"
COMPLETE = "_complete.json"
FORMAT = 1


@dataclass(frozen=True)
class ShardNote:
    """What a writer knows of a shard that it has ended."""

    rows: int
    bytes: int  # of the file
    sha256: str  # of the rows, as in the shard's footer

    @classmethod
    def read(cls, value: Any) -> ShardNote:
        """Return the note in ``value``; raises TypeError or KeyError where it is none."""
        rows, size, digest = value["rows"], value["bytes"], value["sha256"]
        if type(rows) is not int or type(size) is not int or not isinstance(digest, str):
            raise TypeError("rows and bytes must be whole numbers, and sha256 text")
        return cls(rows, size, digest)


@dataclass(frozen=True)
class Complete:
    """What ``_complete.json`` says: the shards by name, and the digest of the plan that they were written by."""

    shards: dict[str, ShardNote]
    plan: str

    @classmethod
    def of(cls, folder: Path | Uri) -> Complete | None:
        """Return what the folder's marker says, None where there is none.

        Raises DataError for a marker that cannot be read, StorageError where the store fails.
        """
        values = read_json(folder / COMPLETE)
        if values is None:
            return None
        try:
            shards = {str(name): ShardNote.read(note) for name, note in values["shards"].items()}
            return cls(shards, str(values["plan"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / COMPLETE} is not what a writer leaves ({type(error).__name__}: {error}); copy it again, or delete it "
                "if all shards are there"
            ) from error


def read_json(place: Path | Uri) -> dict[str, Any] | None:
    """Return the JSON object at ``place``, None where there is no such file; raises DataError for anything else."""
    try:
        values = json.loads(read_bytes(place))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{place} holds no JSON object")
    return values


def plan_digest(plan: Mapping[str, Any] | None) -> str:
    """Return the SHA-256 of a writer's plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def written(folder: Path | Uri, plan: Mapping[str, Any]) -> bool:
    """Return whether ``folder`` holds all that a writer with ``plan`` writes. Raises as :meth:`Complete.of`."""
    complete = Complete.of(folder)
    return complete is not None and complete.plan == plan_digest(plan)


class Journal:
    """The notes of one writer in its folder, from :meth:`claim` to :meth:`complete` or :meth:`leave`.

    ``plan`` says in JSON what is written; a writer with an equal one goes on where an interrupted one stopped. None: no
    other writer can. On this machine a lock keeps a second writer out, and ends with the process. In a store the last
    writer that came has the folder, and the one before finds out (:meth:`require_mine`).
    """

    def __init__(self, folder: Path | Uri, plan: Mapping[str, Any] | None) -> None:
        self.folder, self.plan = folder, plan
        self.token = uuid.uuid4().hex
        self._lock: IO[bytes] | None = None
        self._claimed = False

    def claim(self, shards: Sequence[str]) -> None:
        """Take the folder, which holds ``shards``. Raises DataError where they are not this writer's to go on with."""
        where = self.folder
        if Complete.of(where) is not None or (shards and not self._is_there(WRITING)):
            raise DataError(f"{where} already holds a dataset; write to an empty folder or delete it first")
        self._take_lock()
        if Complete.of(where) is not None:  # its writer ended between the look and the lock
            self._claimed = True
            self.leave(keep=False)
            raise DataError(f"{where} already holds a dataset; write to an empty folder or delete it first")
        try:
            earlier = read_json(where / WRITING) or {}
        except DataError:  # its writer was killed at the first moment
            earlier = {}
        if shards and (self.plan is None or earlier.get("plan") != self.plan):
            self._release()
            raise DataError(
                f"{where} holds {len(shards)} shards of another write that was interrupted{_differences(earlier, self.plan)}. "
                "The same command as then goes on where it stopped; to begin anew, delete the folder or write to another one"
            )
        self._say()

    def take_over(self) -> None:
        """Take the folder, whatever it holds; raises DataError where a living process of this machine writes to it."""
        self._take_lock()
        self._say()

    def require_mine(self) -> None:
        """Raise DataError where another writer has taken the folder. A store has no locks, so each shard asks."""
        if self._lock is not None:
            return
        values = read_json(self.folder / WRITING) or {}
        if values.get("writer") != self.token:
            other = f" (process {values.get('pid')} on {values.get('host')})" if values else ""
            raise DataError(f"{self.folder}: another process{other} writes into this folder; this one stops")

    def note(self, shard: str, note: ShardNote, progress: Any) -> None:
        """Write down what is known of ``shard`` before it gets its name, so that a later writer need not repeat it."""
        if self.plan is not None:
            self._put(_note_name(shard), asdict(note) | {"progress": progress})

    def noted(self, shard: str) -> tuple[ShardNote, Any] | None:
        """Return note and progress of ``shard``, None where there is no readable one."""
        try:
            values = read_json(self.folder / _note_name(shard))
            return None if values is None else (ShardNote.read(values), values.get("progress"))
        except (DataError, KeyError, TypeError):
            return None

    def complete(self, shards: Mapping[str, ShardNote]) -> None:
        """Say that ``shards`` are all there is, and take the notes away."""
        self.require_mine()
        values = {
            "format": FORMAT,
            "rows": sum(note.rows for note in shards.values()),
            "plan": plan_digest(self.plan),
            "shards": {name: asdict(note) for name, note in shards.items()},
        }
        self._put(COMPLETE, values)
        for name in shards:
            remove(self.folder / _note_name(name))
        self.leave(keep=False)

    def leave(self, *, keep: bool) -> None:
        """Let go of the folder; ``keep`` leaves the marker of an interrupted write."""
        if self._claimed and not keep:
            with suppress(OSError, VansError):  # what ended the write says more
                self.require_mine()
                remove(self.folder / WRITING)
        self._release()

    def _say(self) -> None:
        facts = {"format": FORMAT, "writer": self.token, "host": socket.gethostname(), "pid": os.getpid()}
        text = json.dumps(facts | {"plan": self.plan}).encode()
        self._claimed = True
        if self._lock is None:
            write_bytes(self.folder / WRITING, text)
            return
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(text)
        self._lock.flush()

    def _put(self, name: str, values: Mapping[str, Any]) -> None:
        text = (json.dumps(values, indent=1) + "\n").encode()
        if isinstance(self.folder, Uri):
            write_bytes(self.folder / name, text)
            return
        beside = self.folder / f".{name}.{self.token}.tmp"
        beside.write_bytes(text)
        os.replace(beside, self.folder / name)

    def _is_there(self, name: str) -> bool:
        if isinstance(self.folder, Path):
            return (self.folder / name).is_file()
        try:
            read_bytes(self.folder / name)
        except FileNotFoundError:
            return False
        return True

    def _take_lock(self) -> None:
        """Lock the marker of a local folder; raises DataError where a living process holds it."""
        if isinstance(self.folder, Uri):
            return
        import fcntl

        path = self.folder / WRITING
        file = path.open("ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.close()  # another writer took its marker away between the two lines above
                file = path.open("ab+")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            told = _parsed(file.read())
            file.close()
            raise DataError(
                f"{self.folder}: process {told.get('pid', '?')} on {told.get('host', '?')} is writing into this folder; let it "
                "end, or write to another folder"
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return
        self._lock = file

    def _release(self) -> None:
        self._claimed = False
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _note_name(shard: str) -> str:
    return f"_{shard.removesuffix('.parquet')}.json"


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _differences(earlier: Mapping[str, Any], plan: Mapping[str, Any] | None) -> str:
    """Return in brackets which parts of two plans differ; nothing where one of them is not known."""
    old = earlier.get("plan")
    if not isinstance(old, dict) or plan is None:
        return ""
    names = sorted(key for key in {*old, *plan} if old.get(key) != plan.get(key))
    return f" (it differs in: {', '.join(names)})"
