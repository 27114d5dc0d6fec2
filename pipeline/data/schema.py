"""The Parquet schema of a VNEP dataset, and the writer that keeps to it.

A dataset is a folder of ``part-00000.parquet``, ``part-00001.parquet``, …; docs/data.md explains each column.
Not responsible for reading (``source``) or for where rows come from (``importers``, ``toy``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from actors.records import SampleKind
from cluster.errors import DataError

KINDS: tuple[str, ...] = get_args(SampleKind)

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

    Row groups are small so that readers stream. A shard gets its name only when it is complete; rows with an id
    that was written before raise DataError. A folder that already holds shards is refused: two datasets never mix.
    """

    def __init__(self, folder: str | Path, *, rows_per_shard: int = 256, rows_per_group: int = 32) -> None:
        self.folder = Path(folder)
        self.count = 0
        self._rows_per_shard, self._rows_per_group = rows_per_shard, rows_per_group
        self._pending: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._shards = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        if shard_paths(self.folder, required=False):
            raise DataError(f"{self.folder} already holds a dataset; write to an empty folder or delete it first")

    def write(self, row: Row | Mapping[str, Any]) -> None:
        """Add one row."""
        row = row if isinstance(row, Row) else Row(**row)
        if row.id in self._ids:
            raise DataError(f"two rows have the id {row.id!r}; ids must be unique")
        self._ids.add(row.id)
        self._pending.append({name: getattr(row, name) for name in SCHEMA.names})
        self.count += 1
        if len(self._pending) >= self._rows_per_shard:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.folder / f"part-{self._shards:05d}.parquet"
        beside = path.with_suffix(".tmp")
        table = pa.Table.from_pylist(self._pending, schema=SCHEMA)
        # Videos are compressed already; text is small.
        pq.write_table(table, beside, row_group_size=self._rows_per_group, compression="zstd", use_dictionary=False)
        os.replace(beside, path)
        self._shards += 1
        self._pending = []

    def close(self) -> None:
        """Write what is pending."""
        self._flush()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def shard_paths(folder: str | Path, *, required: bool = True) -> list[Path]:
    """Return the shards of ``folder`` in name order; raises DataError when there is none and one is ``required``."""
    folder = Path(folder)
    shards = sorted(path for path in folder.glob("*.parquet") if path.is_file())
    if required and not shards:
        reason = "holds no .parquet shards" if folder.is_dir() else "does not exist"
        raise DataError(f"dataset folder {folder} {reason}; make one with `vans data toy` or `vans data import-vans`")
    return shards


def check_schema(path: Path) -> None:
    """Raise DataError unless the shard at ``path`` has the columns of :data:`SCHEMA` (``answer`` may be missing)."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    for field in SCHEMA:
        position = schema.get_field_index(field.name)
        if position < 0:
            if field.nullable:
                continue
            raise DataError(f"{path} has no column {field.name!r}; it needs {', '.join(SCHEMA.names)}")
        found = schema.field(position).type
        same = found == field.type or (pa.types.is_large_string(found) or pa.types.is_large_binary(found))
        if not same:
            raise DataError(f"{path}: column {field.name!r} is {found}, and must be {field.type}")
