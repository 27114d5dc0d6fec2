"""Shards and their writer: what is accepted, what a digest tells apart, and what an error or another writer leaves."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from pipeline.data.marker import COMPLETE, WRITING
from pipeline.data.schema import (
    DIGEST_KEY,
    SCHEMA,
    Row,
    ShardWriter,
    check_schema,
    shard_digest,
    shard_metadata,
    shard_paths,
)
from pipeline.support.location import parse_location


def row(name: str, **values: str | bytes) -> Row:
    defaults = {"kind": "procedural", "question": "q", "caption": "c", "input_video": b"v", "target_video": b"w"}
    return Row(**{"id": name, **defaults, **values})  # type: ignore[arg-type]


def write(folder: Path, names: str, **options: object) -> list[str]:
    """Write a row per letter of ``names``; returns the digests of the shards."""
    with ShardWriter(folder, **options) as writer:  # type: ignore[arg-type]
        for name in names:
            writer.write(row(name))
    return [shard_digest(path, shard_metadata(path)) for path in shard_paths(folder)]


def test_a_shards_digest_is_of_its_own_rows(tmp_path: Path) -> None:
    first, second = write(tmp_path / "both", "abcd", rows_per_shard=2)
    assert [second] == write(tmp_path / "second", "cd")
    assert [first] == write(tmp_path / "first", "ab")


def test_a_digest_tells_apart_what_values_would_give_the_same_bytes_in_a_row(tmp_path: Path) -> None:
    digests = set()
    for number, (question, caption) in enumerate([("ab", "c"), ("a", "bc")]):
        with ShardWriter(tmp_path / str(number)) as writer:
            writer.write(row("x", question=question, caption=caption))
        (path,) = shard_paths(tmp_path / str(number))
        digests.add(shard_digest(path, shard_metadata(path)))
    assert len(digests) == 2


def test_a_shard_that_was_rewritten_loses_its_writers_digest(tmp_path: Path) -> None:
    (before,) = write(tmp_path, "abc")
    (path,) = shard_paths(tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "caption", pa.array(["another"] * 3)), path)
    assert DIGEST_KEY.encode() not in (shard_metadata(path).metadata or {})
    assert shard_digest(path, shard_metadata(path)) != before


def test_columns_that_may_be_missing_and_large_types_are_accepted() -> None:
    without = pa.schema([field for field in SCHEMA if field.name != "answer"])
    check_schema(Path("x"), without)
    large = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    check_schema(Path("x"), pa.schema([pa.field(f.name, large[f.type]) for f in SCHEMA]))
    with pytest.raises(DataError, match="x has no column 'caption'"):
        check_schema(Path("x"), pa.schema([field for field in SCHEMA if field.name != "caption"]))
    wrong = SCHEMA.set(4, pa.field("input_video", pa.large_string()))
    with pytest.raises(DataError, match="column 'input_video' is large_string, and must be binary"):
        check_schema(Path("x"), wrong)


@pytest.mark.parametrize("uri", [False, True])
def test_files_of_other_programs_are_no_shards(tmp_path: Path, uri: bool) -> None:
    write(tmp_path / "set", "ab")
    apple = bytes.fromhex("00051607000200004d6163204f532058")
    for name in (
        "._part-00000.parquet",
        ".part-00001.parquet.tmp",
        ".DS_Store",
        "_SUCCESS",
        "Thumbs.db",
        "_metadata.parquet",
    ):
        (tmp_path / "set" / name).write_bytes(apple)
    (tmp_path / "set" / "sub.parquet").mkdir()
    folder = parse_location(f"file://{tmp_path}/set") if uri else tmp_path / "set"
    assert [path.name for path in shard_paths(folder)] == ["part-00000.parquet"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "._part-00000.parquet").write_bytes(apple)
    other = parse_location(f"file://{tmp_path}/other") if uri else tmp_path / "other"
    with pytest.raises(DataError, match=r"holds no \.parquet shards"):
        shard_paths(other)


def test_an_error_leaves_whole_shards_and_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, rows_per_shard=2, group_bytes=1) as writer:
        for name in "abc":
            writer.write(row(name))  # the third one is on the disk already, in the second shard's first group
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [WRITING, "part-00000.parquet"]
    with pytest.raises(DataError, match="1 shards of another write that was interrupted"):
        ShardWriter(tmp_path)


def test_an_error_before_the_first_shard_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, plan={"a": 1}, group_bytes=1) as writer:
        writer.write(row("a"))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with ShardWriter(tmp_path):
        pass
    assert not list(tmp_path.iterdir()), "a folder without rows is no dataset, and has no marker"


def interrupt(folder: Path, names: str, plan: dict[str, int] | None) -> None:
    """Write as a process that is killed does: nothing is tidied up."""
    writer = ShardWriter(folder, plan=plan, progress=lambda: writer.count, rows_per_shard=2, group_bytes=1)
    for name in names:
        writer.write(row(name))
    writer._journal._release()  # what the system does with a dead process's locks


def test_a_write_of_the_same_plan_goes_on_after_its_whole_shards(tmp_path: Path) -> None:
    interrupt(tmp_path / "cut", "abcde", {"n": 7})
    assert len(list((tmp_path / "cut").glob(".part-00002.parquet.*.tmp"))) == 1
    with ShardWriter(tmp_path / "cut", plan={"n": 7}, rows_per_shard=2, group_bytes=1) as writer:
        assert (writer.count, writer.kept) == (4, [2, 4])
        with pytest.raises(DataError, match="two rows have the id 'b'"):
            writer.write(row("b"))
        for name in "efg":
            writer.write(row(name))
    write(tmp_path / "whole", "abcdefg", plan={"n": 7}, rows_per_shard=2, group_bytes=1)
    whole, cut = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert cut == whole and COMPLETE in whole


@pytest.mark.parametrize("damage", ["bytes", "cut", "rewritten", "note"])
def test_a_shard_that_is_not_what_was_noted_is_written_again(tmp_path: Path, damage: str) -> None:
    interrupt(tmp_path / "cut", "abcdef", {})
    path = tmp_path / "cut" / "part-00001.parquet"
    content = path.read_bytes()
    if damage == "bytes":
        chunk = shard_metadata(path).row_group(0).column(SCHEMA.names.index("target_video"))
        place = chunk.data_page_offset + chunk.total_compressed_size - 1
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "cut":
        path.write_bytes(content[:-40])
    elif damage == "rewritten":
        pq.write_table(pq.read_table(path), path)
    else:
        (tmp_path / "cut" / "_part-00001.json").write_text("{")
    with ShardWriter(tmp_path / "cut", plan={}, rows_per_shard=2) as writer:
        assert writer.count == 2
        assert [p.name for p in shard_paths(tmp_path / "cut")] == ["part-00000.parquet"]
        for name in "cdef":
            writer.write(row(name))
    assert [i for p in shard_paths(tmp_path / "cut") for i in pq.read_table(p)["id"].to_pylist()] == list("abcdef")


def test_another_plan_does_not_go_on_with_the_part_of_one(tmp_path: Path) -> None:
    interrupt(tmp_path, "ab", {"seed": 0, "rows": 9})
    with pytest.raises(DataError, match=r"1 shards of another write that was interrupted \(it differs in: seed\)"):
        ShardWriter(tmp_path, plan={"seed": 1, "rows": 9})
    with ShardWriter(tmp_path, plan={"seed": 0, "rows": 9}) as writer:
        assert writer.count == 2
    with pytest.raises(DataError, match="already holds a dataset"):
        ShardWriter(tmp_path, plan={"seed": 0, "rows": 9})


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, plan={}) as writer:
        writer.write(row("a"))
        with pytest.raises(DataError, match=r"process \d+ on .* is writing into this folder"):
            ShardWriter(tmp_path, plan={})
        writer.write(row("b"))
    (path,) = shard_paths(tmp_path)
    assert shard_metadata(path).num_rows == 2


def test_in_a_store_the_writer_that_came_last_has_the_folder(tmp_path: Path) -> None:
    folder = parse_location(f"file://{tmp_path}/set")
    with pytest.raises(DataError, match="another process writes into this folder; this one stops"):
        with ShardWriter(folder, plan={}, rows_per_shard=1) as first:
            first.write(row("a"))
            with ShardWriter(folder, plan={}, rows_per_shard=1) as second:
                assert second.count == 1
                second.write(row("b"))
            first.write(row("c"))
    assert [p.name for p in shard_paths(folder)] == ["part-00000.parquet", "part-00001.parquet"]
    assert (tmp_path / "set" / COMPLETE).is_file()
