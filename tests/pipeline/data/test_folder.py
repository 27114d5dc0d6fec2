"""What a reader makes of a folder: whole, a part, of another writer, and ids that stand in two rows."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from pipeline.data.folder import duplicate_ids, open_dataset, seal, survey
from pipeline.data.inspect import inspect, print_report
from pipeline.data.marker import COMPLETE, WRITING
from pipeline.data.schema import SCHEMA
from pipeline.data.source import SampleSource
from pipeline.support.location import Uri, parse_location
from tests.pipeline.data.test_schema import interrupt, row, write


@pytest.fixture(params=["path", "uri"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Uri:
    """``tmp_path/set``, as a path and as a URI of a store."""
    return tmp_path / "set" if request.param == "path" else parse_location(f"file://{tmp_path}/set")


def test_a_whole_folder_is_known_by_its_marker(tmp_path: Path, place: Any, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "set", "abcd", rows_per_shard=2)
    found = open_dataset(place)
    assert (found.rows, len(found.shards), found.vouched, found.problems) == (4, 2, True, [])
    assert found.completeness == f"yes ({COMPLETE})" and not caplog.records


def test_a_part_of_an_interrupted_write_is_refused_and_inspect_says_so(
    tmp_path: Path, place: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(tmp_path / "set", "abc", {"command": "import"})
    with pytest.raises(DataError, match=r"holds a part of a dataset \(1 shards\): its write was interrupted"):
        open_dataset(place)
    with pytest.raises(DataError, match="The same command again finishes it"):
        SampleSource(place)
    report = inspect(place, sheet=tmp_path / "sheet.png")
    assert report.rows == 2 and report.whole.startswith("no") and len(report.problems) == 1
    print_report(report)
    assert "not usable: " in capsys.readouterr().out
    sealed = seal(place)
    assert (sealed.rows, sealed.vouched) == (2, True)
    assert not (tmp_path / "set" / WRITING).exists()
    assert SampleSource(place).count == 2


def test_a_write_that_was_cut_before_its_first_shard_is_told_as_that(tmp_path: Path, place: Any) -> None:
    interrupt(tmp_path / "set", "a", {})
    with pytest.raises(DataError, match=r"holds a part of a dataset \(0 shards\)"):
        open_dataset(place)


def test_a_writer_at_work_is_no_whole_dataset_and_cannot_be_sealed(tmp_path: Path) -> None:
    from pipeline.data.schema import ShardWriter

    with ShardWriter(tmp_path, rows_per_shard=1) as writer:
        writer.write(row("a"))
        with pytest.raises(DataError, match="interrupted, or goes on"):
            open_dataset(tmp_path)
        with pytest.raises(DataError, match="is writing into this folder"):
            seal(tmp_path)
    assert open_dataset(tmp_path).vouched


def test_a_copy_that_lacks_a_shard_is_refused(tmp_path: Path, place: Any) -> None:
    write(tmp_path / "set", "abcdef", rows_per_shard=2)
    (tmp_path / "set" / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"is not whole: _complete\.json names part-00001\.parquet, which is not there"):
        open_dataset(place)
    assert seal(place).vouched and open_dataset(place).rows == 4


def test_a_folder_of_another_writer_is_read_with_a_warning_until_it_is_sealed(
    tmp_path: Path, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "set").mkdir()
    columns = {f.name: pa.large_string() if f.type == pa.string() else pa.large_binary() for f in SCHEMA}
    schema = pa.schema([pa.field(name, kind) for name, kind in columns.items() if name != "answer"])
    values = [{name: getattr(row(i), name) for name in schema.names} for i in "ab"]
    pq.write_table(pa.Table.from_pylist(values, schema=schema), tmp_path / "set" / "mine.parquet")
    with caplog.at_level(logging.WARNING):
        found = open_dataset(place)
    assert found.rows == 2 and "there is no _complete.json" in caplog.text and "--seal" in caplog.text
    caplog.clear()
    seal(place)
    assert open_dataset(place).vouched and not caplog.records


@pytest.mark.parametrize("what", ["changed", "added"])
def test_shards_that_changed_or_came_later_are_read_with_a_warning(tmp_path: Path, what: str) -> None:
    write(tmp_path, "abcd", rows_per_shard=2)
    path = tmp_path / "part-00001.parquet"
    table = pq.read_table(path)
    if what == "changed":
        pq.write_table(table.slice(0, 1), path)
    else:
        pq.write_table(table.set_column(0, "id", pa.array(["e", "f"])), tmp_path / "more.parquet")
    found = open_dataset(tmp_path)
    assert not found.vouched and f"{'part-00001' if what == 'changed' else 'more'}.parquet {what}" in found.completeness
    assert found.rows == (3 if what == "changed" else 6)


@pytest.mark.parametrize("marked", [False, True])
def test_an_id_in_two_shards_is_found_when_the_folder_is_opened(tmp_path: Path, place: Any, marked: bool) -> None:
    write(tmp_path / "set", "abc")
    write(tmp_path / "other", "xcb")
    shutil.copy(tmp_path / "other" / "part-00000.parquet", tmp_path / "set" / "part-00001.parquet")
    if not marked:
        (tmp_path / "set" / COMPLETE).unlink()
    for attempt in (open_dataset, seal, SampleSource):
        with pytest.raises(DataError) as caught:
            attempt(place)
        told = str(caught.value)
        assert "the id 'c' stands in part-00000.parquet row 2 and part-00001.parquet row 1, as do 1 more ids" in told
        assert "import both manifests in one call" in told
    assert survey(place).problems


def test_an_id_twice_in_one_shard_is_found_too(tmp_path: Path) -> None:
    write(tmp_path, "ab")
    path = tmp_path / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(
        DataError, match=r"'a' stands in part-00000\.parquet row 0 and part-00000\.parquet row 2, as do 1"
    ):
        open_dataset(tmp_path)


def test_two_folders_copied_into_one_are_a_part_where_one_of_them_is(tmp_path: Path) -> None:
    write(tmp_path / "set", "ab")
    interrupt(tmp_path / "part", "cde", {})
    for path in (tmp_path / "part").iterdir():
        if path.suffix == ".parquet":
            shutil.copy(path, tmp_path / "set" / "part-00007.parquet")
        elif path.name == WRITING:
            shutil.copy(path, tmp_path / "set")
    with pytest.raises(DataError, match="holds a part of a dataset"):
        open_dataset(tmp_path / "set")


def test_rows_without_an_id_and_damaged_groups_are_left_to_decoding(tmp_path: Path, place: Any) -> None:
    write(tmp_path / "set", "abcd", group_bytes=1)
    (tmp_path / "set" / COMPLETE).unlink()
    path = tmp_path / "set" / "part-00000.parquet"
    footer, content = pq.read_metadata(path), bytearray(path.read_bytes())
    chunk = footer.row_group(1).column(0)
    content[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    path.write_bytes(content)
    assert duplicate_ids(survey(place)) == ""
    empty = pa.table({f.name: pa.array([None, None], f.type) for f in SCHEMA})
    pq.write_table(empty, tmp_path / "set" / "nulls.parquet")
    assert open_dataset(place).rows == 6


def test_a_digest_is_of_the_rows_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "set", "abcd", rows_per_shard=2)
    before = open_dataset(tmp_path / "set").digest
    shutil.copytree(tmp_path / "set", tmp_path / "renamed")
    (tmp_path / "renamed" / COMPLETE).unlink()
    (tmp_path / "renamed" / "part-00000.parquet").rename(tmp_path / "renamed" / "a.parquet")
    assert open_dataset(tmp_path / "renamed").digest == before  # the same rows at the same places
    (tmp_path / "renamed" / "a.parquet").rename(tmp_path / "renamed" / "z.parquet")
    assert open_dataset(tmp_path / "renamed").digest != before


def test_a_folder_that_changes_while_it_is_read_ends_the_reading(tmp_path: Path, place: Any) -> None:
    write(tmp_path / "set", "abcdef", rows_per_shard=3)
    source, shard = SampleSource(place), tmp_path / "set" / "part-00001.parquet"
    before = source._unchanged()
    shard.touch()
    assert source._unchanged()[0] == before[0], "another time, and the same rows"
    table = pq.read_table(shard)
    pq.write_table(table.take([1, 0, 2]), shard)
    with pytest.raises(DataError, match="holds other rows than when it was opened"):
        source._unchanged()
    shard.unlink()
    with pytest.raises(DataError, match=r"gone since the folder was opened|is not whole|holds other rows"):
        source._unchanged()
