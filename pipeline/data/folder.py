"""What a dataset folder holds, as every reader opens it: shards, rows, digest, and whether that can be the whole dataset.

Opening reads footers and markers. Where no marker vouches for the shards, it reads their ids too, because an id has to
name one row. Not responsible for writing (``schema.ShardWriter``, ``marker``) or for decoding (``source``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from pipeline.data.marker import COMPLETE, WRITING, Complete, Journal, ShardNote, read_json
from pipeline.data.schema import open_shard, shard_bytes, shard_digest, shard_metadata, shard_paths
from pipeline.support.location import Uri, parse_location

READERS = 8  # shards of a store whose ids are read at a time
NAMED = 3  # ids or shards that an error names

log = logging.getLogger(__name__)


@dataclass
class Dataset:
    """A folder of shards that has been looked at. ``problems`` say why it must not be used, ``completeness`` what is known."""

    folder: Path | Uri
    shards: Sequence[Path | Uri]
    footers: list[pq.FileMetaData]
    digests: list[str]  # of each shard's rows
    completeness: str = ""
    problems: list[str] = field(default_factory=list)
    vouched: bool = False  # a marker names these shards and no others, as they are

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(footer.num_rows for footer in self.footers)

    @property
    def digest(self) -> str:
        """A digest of the rows in reading order; equal for copies, and for shards with other names in the same order."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()


def open_dataset(folder: str | Path | Uri) -> Dataset:
    """Return the dataset in ``folder``, a path or URI.

    A folder without a marker is opened with a warning. Raises DataError where there are no shards, where they are known to be
    a part only, or where an id stands in two rows; StorageError.
    """
    found = survey(folder)
    if found.problems:
        raise DataError(found.problems[0])
    if not found.vouched:
        log.warning("%s: %s", found.folder, found.completeness)
    return found


def survey(folder: str | Path | Uri) -> Dataset:
    """Return the dataset in ``folder`` with what is wrong with it. Raises DataError where it cannot be read at all."""
    folder = parse_location(folder)
    shards = _shards(folder)
    footers = [shard_metadata(path) for path in shards]
    digests = [shard_digest(path, footer) for path, footer in zip(shards, footers, strict=True)]
    found = Dataset(folder, shards, footers, digests)
    _judge(found)
    if not found.vouched and (told := duplicate_ids(found)):
        found.problems.append(told)
    return found


def seal(folder: str | Path | Uri) -> Dataset:
    """Declare that what lies in ``folder`` is the whole dataset: write its marker, and take an interrupted write's away.

    Raises DataError where an id stands in two rows, or another process is writing there.
    """
    found = survey(folder)
    if told := duplicate_ids(found):
        raise DataError(told)
    names = (path.name for path in found.shards)
    notes = zip(found.footers, map(shard_bytes, found.shards), found.digests, strict=True)
    journal = Journal(found.folder, None)
    journal.take_over()
    journal.complete(
        {name: ShardNote(f.num_rows, size, digest) for name, (f, size, digest) in zip(names, notes, strict=True)}
    )
    return survey(folder)


def _shards(folder: Path | Uri) -> Sequence[Path | Uri]:
    shards = shard_paths(folder, required=False)
    if not shards and read_json(folder / WRITING) is not None:
        raise DataError(_interrupted(folder, 0))
    return shards or shard_paths(folder)


def _judge(found: Dataset) -> None:
    """Compare the shards with the markers."""
    folder = found.folder
    complete, writing = Complete.of(folder), _writing(folder)
    here = {path.name: place for place, path in enumerate(found.shards)}
    if complete is None:
        if writing:
            found.completeness = "no: its write was interrupted, or goes on"
            found.problems.append(_interrupted(folder, len(found.shards)))
            return
        found.completeness = (
            f"not known: there is no {COMPLETE}, so a part of the dataset would look the same. If it is whole, "
            f"`vans data inspect --seal {folder}` says so to every reader"
        )
        return
    if missing := [name for name in complete.shards if name not in here]:
        found.completeness = f"no: {len(missing)} of {len(complete.shards)} shards are missing"
        found.problems.append(
            f"{folder} is not whole: {COMPLETE} names {_some(missing)}, which {'is' if len(missing) == 1 else 'are'} not there. "
            f"Copy the folder again; to use it as it is, `vans data inspect --seal {folder}`"
        )
        return
    changed = [
        name
        for name, note in complete.shards.items()
        if (found.footers[here[name]].num_rows, shard_bytes(found.shards[here[name]]), found.digests[here[name]])
        != (note.rows, note.bytes, note.sha256)
    ]
    added = [name for name in here if name not in complete.shards]
    parts = [f"{_some(names)} {what}" for names, what in ((changed, "changed"), (added, "added")) if names]
    found.vouched = not parts
    found.completeness = f"yes ({COMPLETE})"
    if parts:
        found.completeness = (
            f"not known: since {COMPLETE} was written, shards were {' and '.join(parts)}. "
            f"If the folder is whole, `vans data inspect --seal {folder}` says so"
        )
        if writing:  # two folders were copied into one, and one of them is a part
            found.problems.append(_interrupted(folder, len(found.shards)))


def _writing(folder: Path | Uri) -> bool:
    try:
        return read_json(folder / WRITING) is not None
    except DataError:  # its writer was killed at the first moment
        return True


def _interrupted(folder: Path | Uri, shards: int) -> str:
    return (
        f"{folder} holds a part of a dataset ({shards} shards): its write was interrupted, or goes on ({WRITING}). The same command "
        f"again finishes it; to use it as it is, `vans data inspect --seal {folder}`"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# --- ids --------------------------------------------------------------------------------------------------------------


def duplicate_ids(found: Dataset) -> str:
    """Return what to say of ids that stand in two rows of the dataset; nothing where there are none.

    Reads the column ``id`` alone. Raises StorageError. A row without an id, or in a damaged row group, is left to decoding.
    """
    first: dict[str, tuple[int, int]] = {}
    twice: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    with ThreadPoolExecutor(READERS if isinstance(found.folder, Uri) else 1) as pool:
        for shard, rows in enumerate(pool.map(lambda path: list(_ids(path)), found.shards)):
            for row, name in rows:
                if name in first:
                    twice.setdefault(name, (first[name], (shard, row)))
                else:
                    first[name] = (shard, row)
    if not twice:
        return ""
    name, places = next(iter(twice.items()))
    where = " and ".join(f"{found.shards[shard].name} row {row}" for shard, row in places)
    more = f", as do {len(twice) - 1} more ids" if len(twice) > 1 else ""
    return (
        f"{found.folder}: the id {name!r} stands in {where}{more}. An id names one row of a folder: seeds and answers go by it. "
        "Where two imports were put into one folder, import both manifests in one call, or keep the folders apart; "
        "docs/data.md shows how to give rows other ids"
    )


def _ids(path: Path | Uri) -> Iterator[tuple[int, str]]:
    """Yield (row, id) of a shard."""
    with open_shard(path) as file:
        if isinstance(path, Uri):
            try:  # one call fetches the column of all row groups together
                yield from _named(0, file.read(columns=["id"])["id"])
                return
            except (pa.ArrowException, OSError):
                pass
        start = 0
        for group in range(file.num_row_groups):
            try:
                yield from _named(start, file.read_row_group(group, columns=["id"])["id"])
            except (pa.ArrowException, OSError):
                log.debug("%s: row group %d is damaged", path, group)
            start += file.metadata.row_group(group).num_rows


def _named(start: int, column: pa.ChunkedArray) -> Iterator[tuple[int, str]]:
    return ((start + i, name) for i, name in enumerate(column.to_pylist()) if name)
