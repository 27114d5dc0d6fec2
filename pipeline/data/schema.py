"""The Parquet schema of a VNEP dataset, and the writer that keeps to it.

A dataset is a folder of ``part-00000.parquet``, ``part-00001.parquet``, …, here or in a store
(``pipeline.support.location``); docs/data.md explains each column.
Not responsible for reading (``source``) or for where rows come from (``importers``, ``toy``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from actors.records import SampleKind
from cluster.errors import DataError
from pipeline.data.marker import Journal, ShardNote, written
from pipeline.support.location import StoredFile, Uri, facts_of, listing, parse_location, remove, sha256_of, upload

KINDS: tuple[str, ...] = get_args(SampleKind)
ROWS_PER_GROUP = 32
DIGEST_KEY = "vans.rows.sha256"  # in a shard's metadata: hash of its rows' values

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # procedural | predictive
        pa.field("question", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # of the next event, ground truth
        pa.field("input_video", pa.binary(), nullable=False),  # mp4 bytes
        pa.field("target_video", pa.binary(), nullable=False),  # mp4 bytes
        pa.field("source", pa.string(), nullable=False),  # where the row was imported from
        pa.field("meta", pa.string(), nullable=False),  # JSON object, handed back at evaluation
        pa.field(
            "answer", pa.string(), nullable=True
        ),  # <think>…</think><ans>…</ans> for SFT; null: made from the caption
    ]
)


@dataclass(frozen=True)
class Row:
    """One row of a dataset. Raises DataError when a value cannot stand in it."""

    id: str
    kind: str
    question: str
    caption: str
    input_video: bytes
    target_video: bytes
    source: str = ""
    meta: str = "{}"
    answer: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "question", "caption"):
            if not getattr(self, name).strip():
                raise DataError(f"row {self.id!r}: {name} is empty")
        if self.kind not in KINDS:
            raise DataError(f"row {self.id!r}: kind {self.kind!r} must be one of {', '.join(KINDS)}")
        for name in ("input_video", "target_video"):
            if not getattr(self, name):
                raise DataError(f"row {self.id!r}: {name} is empty")
        try:
            parsed = json.loads(self.meta)
        except ValueError as error:
            raise DataError(f"row {self.id!r}: meta must be a JSON object: {error}") from error
        if not isinstance(parsed, dict):
            raise DataError(f"row {self.id!r}: meta must be a JSON object, not {type(parsed).__name__}")


class ShardWriter:
    """Write rows into Parquet shards of one folder.

    >>> with ShardWriter(folder) as writer:
    ...     writer.write(Row(id="a", kind="predictive", question=…, caption=…, input_video=…, target_video=…))

    Row groups are small, because rows are read in a shuffled order and a group is what is read at once. A shard gets its name
    only when it is complete, and the folder its marker only when all shards are (``marker``). Rows with an id that was written
    before raise DataError. A folder that holds a dataset, or that another process is writing to, is refused: two datasets
    never mix. ``folder`` may be a URI: a shard is then written on this machine and uploaded when it is complete, because a
    store would show what an error cut short. Raises StorageError.

    ``plan``: what is written, as JSON. A write of the same plan that was interrupted is continued: its shards are checked and
    kept, ``count`` rows are in them, and ``kept`` has what ``progress`` returned at the end of each; the caller then writes the
    rows that follow, with the same sizes. Without a plan an interrupted write cannot be continued.
    """

    def __init__(
        self,
        folder: str | Path | Uri,
        *,
        plan: Mapping[str, Any] | None = None,
        progress: Callable[[], Any] | None = None,
        rows_per_shard: int = 1024,
        shard_bytes: int = 512 << 20,
        group_bytes: int = 2 << 20,
    ) -> None:
        self.folder = parse_location(folder)
        self.count = 0
        self.kept: list[Any] = []
        self._progress = progress or (lambda: None)
        self._rows_per_shard, self._shard_bytes, self._group_bytes = rows_per_shard, shard_bytes, group_bytes
        self._group: list[dict[str, Any]] = []
        self._group_size = self._shard_rows = self._shard_size = self._shards = 0
        self._ids: set[str] = set()
        self._notes: dict[str, ShardNote] = {}
        self._parquet: pq.ParquetWriter | None = None
        self._hash = hashlib.sha256()
        if isinstance(self.folder, Path):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.folder, None if plan is None else writer_plan(plan))
        earlier = shard_paths(self.folder, required=False)
        self._journal.claim([path.name for path in earlier])
        self._scratch = tempfile.TemporaryDirectory(prefix="vans-shards-") if isinstance(self.folder, Uri) else None
        try:
            self._take_up(earlier)
        except BaseException:
            self._tidy(keep=True)
            raise

    def write(self, row: Row | Mapping[str, Any]) -> None:
        """Add one row."""
        row = row if isinstance(row, Row) else Row(**row)
        self.require_new(row)
        self._ids.add(row.id)
        values = {name: getattr(row, name) for name in SCHEMA.names}
        size = hash_row(self._hash, values)
        self._group.append(values)
        self.count += 1
        self._group_size += size
        self._shard_rows += 1
        self._shard_size += size
        if self._shard_rows >= self._rows_per_shard or self._shard_size >= self._shard_bytes:
            self._end_shard()
        elif self._group_size >= self._group_bytes or len(self._group) >= ROWS_PER_GROUP:
            self._end_group()

    @staticmethod
    def wrote(folder: Path | Uri, plan: Mapping[str, Any]) -> bool:
        """Return whether a writer of ``plan`` has written ``folder`` to its end."""
        return written(folder, writer_plan(plan))

    def require_new(self, row: Row) -> None:
        """Raise DataError where a row with the id of ``row`` was written before."""
        if row.id in self._ids:
            raise DataError(f"two rows have the id {row.id!r}; ids must be unique")

    def _path(self) -> Path:
        """The shard's place on this machine."""
        return (self.folder if isinstance(self.folder, Path) else Path(self._scratch.name)) / self._name()  # type: ignore[union-attr]

    def _name(self) -> str:
        return f"part-{self._shards:05d}.parquet"

    def _beside(self) -> Path:
        """Where the shard is written before it has its name; no other writer's file is called so."""
        return self._path().with_name(f".{self._name()}.{self._journal.token}.tmp")

    def _end_group(self) -> None:
        if not self._group:
            return
        if self._parquet is None:
            # Videos are compressed already; the codec is for the text.
            self._parquet = pq.ParquetWriter(self._beside(), SCHEMA, compression="zstd", use_dictionary=False)
        self._parquet.write_table(pa.Table.from_pylist(self._group, schema=SCHEMA))
        self._group, self._group_size = [], 0

    def _end_shard(self) -> None:
        self._end_group()
        if self._parquet is None:
            return
        self._parquet.add_key_value_metadata({DIGEST_KEY: self._hash.hexdigest()})
        self._parquet.close()
        beside, path = self._beside(), self._path()
        note = ShardNote(self._shard_rows, beside.stat().st_size, self._hash.hexdigest())
        self._journal.require_mine()
        self._journal.note(path.name, note, self._progress())
        os.replace(beside, path)
        self._parquet = None
        if isinstance(self.folder, Uri):
            upload(path, self.folder / path.name)
            path.unlink()
        self._notes[path.name] = note
        self._hash = hashlib.sha256()
        self._shards += 1
        self._shard_rows = self._shard_size = 0

    def _take_up(self, earlier: Sequence[Path | Uri]) -> None:
        """Keep the shards of an interrupted write that are as their notes say, in order; remove the others."""
        if isinstance(self.folder, Path):
            for temporary in self.folder.glob(".*.tmp"):
                if _LEFT_BEHIND.fullmatch(temporary.name):
                    temporary.unlink(missing_ok=True)
        left = {path.name: path for path in earlier if _OURS.fullmatch(path.name)}
        while (path := left.get(self._name())) is not None and (found := self._journal.noted(path.name)) is not None:
            note, progress = found
            if (ids := _ids_of(path, note)) is None:
                break
            del left[path.name]
            self._ids.update(ids)
            self._notes[path.name] = note
            self.count += note.rows
            self.kept.append(progress)
            self._shards += 1
        for rejected in left.values():
            remove(rejected)

    def close(self) -> None:
        """Write what is pending, and the marker that says that this is all; a folder without rows gets none."""
        self._end_shard()
        if self._notes:
            self._journal.complete(self._notes)
        self._tidy(keep=False)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._parquet is not None:  # an error, here or in the block
                with suppress(OSError, pa.ArrowException):  # it says more than what closing says of a full disk
                    self._parquet.close()
                self._beside().unlink(missing_ok=True)
                self._parquet = None
            self._tidy(keep=bool(self._notes))

    def _tidy(self, *, keep: bool) -> None:
        self._journal.leave(keep=keep)
        if self._scratch is not None:
            self._scratch.cleanup()


_OURS = re.compile(r"part-\d+\.parquet")
_LEFT_BEHIND = re.compile(r"\.(part-\d+\.parquet|_part-\d+\.json|_complete\.json)\.[0-9a-f]{32}\.tmp")


def writer_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``plan`` as JSON gives it back; raises TypeError where it is no JSON."""
    values: dict[str, Any] = json.loads(json.dumps(plan))
    return values


def hash_row(digest: Any, values: Mapping[str, Any]) -> int:
    """Add a row's ``values`` to ``digest``, each with its length in front; returns their bytes."""
    size = 0
    for name in SCHEMA.names:
        value = values[name]
        data = value if isinstance(value, bytes) else (value or "").encode()
        digest.update(len(data).to_bytes(8, "big") + data)
        size += len(data)
    return size


def _ids_of(path: Path | Uri, note: ShardNote) -> list[str] | None:
    """Return the ids in a shard that is what ``note`` says, else None.

    On this machine all of its rows are read and hashed; in a store the size and the footer have to do.
    """
    try:
        with open_shard(path) as file:
            footer = file.metadata
            if (footer.num_rows, shard_bytes(path), shard_digest(path, footer)) != (note.rows, note.bytes, note.sha256):
                return None
            if isinstance(path, Uri):
                return file.read(columns=["id"])["id"].to_pylist()
            digest, ids = hashlib.sha256(), []
            for batch in file.iter_batches(ROWS_PER_GROUP):
                for row in batch.to_pylist():
                    hash_row(digest, row)
                    ids.append(row["id"])
    except (pa.ArrowException, OSError, KeyError):
        return None
    return ids if digest.hexdigest() == note.sha256 else None


def shard_paths(folder: str | Path | Uri, *, required: bool = True) -> Sequence[Path | Uri]:
    """Return the shards of ``folder`` in name order; raises DataError when there is none and one is ``required``.

    What other programs leave in a folder is passed over (:func:`is_shard`). Raises StorageError where the store does not
    answer, or has no such bucket.
    """
    folder = parse_location(folder)
    if isinstance(folder, Uri):
        return _stored_shards(folder, required)
    shards = sorted(path for path in folder.glob("*.parquet") if is_shard(path.name) and path.is_file())
    if required and not shards:
        reason = "holds no .parquet shards" if folder.is_dir() else "does not exist"
        if below := sorted({path.parent.name for path in folder.glob("*/*.parquet") if is_shard(path.name)}):
            raise DataError(f"dataset folder {folder} {reason}; did you mean a folder in it: {', '.join(below)}?")
        raise DataError(f"dataset folder {folder} {reason}; make one with `vans data toy` or `vans data import-vans`")
    return shards


def is_shard(name: str) -> bool:
    """Return whether a file of this name is a shard.

    Names that begin with a dot or an underscore are not, as for other readers of Parquet folders: AppleDouble files
    (``._part.parquet``), summaries (``_metadata``), temporary files.
    """
    return name.endswith(".parquet") and not name.startswith((".", "_"))


def _stored_shards(folder: Uri, required: bool) -> list[Uri]:
    found = listing(folder)
    shards = [folder / info.base_name for info in found if info.is_file and is_shard(info.base_name)]
    if required and not shards:
        names = [info.base_name for info in found if not info.is_file]
        below = [name for name in names if any(is_shard(info.base_name) for info in listing(folder / name))]
        hint = f"; did you mean a folder in it: {', '.join(below)}?" if below else ""
        raise DataError(
            f"dataset folder {folder} holds no .parquet shards{hint or '; `vans data toy --out URI` makes some'}"
        )
    return shards


def check_schema(path: Path | Uri, schema: pa.Schema) -> None:
    """Raise DataError unless ``schema``, of the shard at ``path``, has the columns of :data:`SCHEMA`.

    ``answer`` may be missing, so may be any nullable column.
    """
    for field in SCHEMA:
        position = schema.get_field_index(field.name)
        if position < 0:
            if field.nullable:
                continue
            raise DataError(f"{path} has no column {field.name!r}; it needs {', '.join(SCHEMA.names)}")
        found = schema.field(position).type
        accepted = _TEXT if pa.types.is_string(field.type) else _BYTES
        if found not in accepted:
            raise DataError(f"{path}: column {field.name!r} is {found}, and must be {field.type}")


_TEXT = (pa.string(), pa.large_string())
_BYTES = (pa.binary(), pa.large_binary())


def open_shard(path: Path | Uri, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Return the Parquet file at ``path``, open, with its ``footer`` where that is known.

    Raises StorageError, here and from its methods, where the store fails, and what pyarrow raises where the file is damaged.
    """
    if isinstance(path, Path):
        return pq.ParquetFile(path, metadata=footer)
    return pq.ParquetFile(StoredFile(path), metadata=footer, pre_buffer=True)


def shard_metadata(path: Path | Uri) -> pq.FileMetaData:
    """Return the footer of the shard at ``path`` after checking its columns; raises DataError."""
    try:
        with open_shard(path) as file:
            metadata = file.metadata
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    check_schema(path, metadata.schema.to_arrow_schema())
    return metadata


def shard_bytes(path: Path | Uri) -> int:
    """Return the size of the shard at ``path``; raises StorageError."""
    if isinstance(path, Path):
        return path.stat().st_size
    return int(facts_of(path).size)


def shard_digest(path: Path | Uri, metadata: pq.FileMetaData) -> str:
    """Return the hash of a shard's rows that its writer left in the footer, or the file's where it left none."""
    written = (metadata.metadata or {}).get(DIGEST_KEY.encode())
    if written:
        return written.decode()
    return sha256_of(path)
