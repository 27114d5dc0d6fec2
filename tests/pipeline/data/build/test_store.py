"""The work area: what is written once stays, half a file is none, and a store does as well as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import DataError
from pipeline.data.build.store import WorkArea, digest_of
from pipeline.support.location import parse_location


@pytest.fixture(params=["folder", "store"])
def area(request: pytest.FixtureRequest, tmp_path: Path) -> WorkArea:
    return WorkArea(tmp_path / "_build" if request.param == "folder" else parse_location(f"file://{tmp_path}/_build"))


def test_a_clip_is_kept_by_its_contents(area: WorkArea) -> None:
    name = area.put(b"mp4")
    assert area.put(b"mp4") == name
    assert area.get(name) == b"mp4"


def test_what_is_written_is_read_back_and_the_rest_is_none(area: WorkArea) -> None:
    key = digest_of("a", 1)
    assert area.read("asks", key) is None
    area.write("asks", key, {"text": "grüße 你好 \ud800"[:9]})
    assert area.read("asks", key) == {"text": "grüße 你好 "[:9]}
    assert area.read("stages/cut", key) is None


def test_half_a_file_counts_as_none_and_a_damaged_clip_is_told(tmp_path: Path) -> None:
    area = WorkArea(tmp_path)
    key = digest_of("x")
    area.write("asks", key, {"text": "whole"})
    [path] = (tmp_path / "asks").rglob("*.json")
    path.write_bytes(path.read_bytes()[:6])
    assert area.read("asks", key) is None
    name = area.put(b"mp4")
    [clip] = (tmp_path / "clips").rglob("*.mp4")
    clip.write_bytes(b"mp")
    with pytest.raises(DataError, match="is damaged"):
        area.get(name)
    clip.unlink()
    with pytest.raises(DataError, match="is gone"):
        area.get(name)


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    area = WorkArea(tmp_path)
    area.put(b"mp4")
    area.write("asks", digest_of("x"), [])
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    area.forget()
    assert not tmp_path.exists()


def test_keys_differ_where_anything_does() -> None:
    keys = [digest_of("a", "b"), digest_of("ab"), digest_of("a", ["b"]), digest_of("b", "a"), digest_of("a", "b", None)]
    assert len(set(keys)) == len(keys)
