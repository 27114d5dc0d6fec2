"""Paths stay paths, URIs stay whole, and what is neither is refused by key, value and cure; credentials are never repeated."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from typer.testing import CliRunner

from cluster.errors import ConfigError, DataError, StorageError
from pipeline.cli import app
from pipeline.commands.data import data as data_commands
from pipeline.config import load_config, parse_config, to_yaml
from pipeline.config.yaml12 import parse_yaml
from pipeline.data.importers.jsonl import import_jsonl
from pipeline.data.inspect import inspect
from pipeline.data.schema import Row, ShardWriter, shard_digest, shard_metadata, shard_paths
from pipeline.data.video import encode_mp4
from pipeline.evaluate.evaluation import named
from pipeline.support.location import LocationError, Uri, listing, local_path, opened, parse_location, storage_errors


def test_paths_are_paths_and_uris_keep_their_slashes() -> None:
    config = load_config(
        "toy", ["data.train=s3://bucket/a/b?region=eu-west-1", "data.eval=/x/y", "sft.vlm.data=gs://b/c"]
    )
    assert config.data.train == Uri("s3://bucket/a/b", "region=eu-west-1") and config.data.eval == Path("/x/y")
    assert isinstance(config.out, Path)
    text = to_yaml(config)
    assert "train: s3://bucket/a/b?region=eu-west-1\n" in text and "data: gs://b/c\n" in text
    assert (
        load_config("toy", ["data.train=s3://bucket/a/b?region=eu-west-1", "data.eval=/x/y", "sft.vlm.data=gs://b/c"])
        == config
    )


def test_the_parts_of_a_uri() -> None:
    uri = parse_location("s3://bucket/runs/a%20b/?region=x")
    assert isinstance(uri, Uri) and uri.name == "a b" and str(uri) == "s3://bucket/runs/a%20b?region=x"
    assert str(uri / "c d") == "s3://bucket/runs/a%20b/c%20d?region=x"
    assert uri.parent.parent == Uri("s3://bucket", "region=x") == uri.parent.parent.parent
    store, path = opened(parse_location("gs://bucket/a%20b"))
    assert store.type_name == "gcs" and path == "bucket/a b"


SECRET = "wJalrXUtnFEMI"
REFUSED = {
    "foo://b/x": r"data\.train: 'foo://b/x' has the unknown scheme 'foo'.*s3://, gs://.*hdfs://",
    "https://b/x": r"unknown scheme 'https'",
    "s3:///x": r"names no bucket: write 's3://BUCKET/FOLDER'",
    "s3://": r"names no bucket",
    "s3:/b/x": r"write 's3://b/x'",
    f"s3://AKIA:{SECRET}@b/x": r"data\.train: s3://\*\*\* holds credentials.*AWS_ACCESS_KEY_ID",
    f"s3://AKIA:{SECRET}/x@b/x": r"holds credentials",
    f"hdfs://me:{SECRET}@host/x": r"holds credentials.*Kerberos",
    f"s3://b/x?secret_key={SECRET}": r"'secret_key'",
    f"s3://b/x?endpoint_override=http%3A%2F%2Fu%3A{SECRET}%40h": r"holds a password",
    "s3://b/a b": r"%20",
    "s3://b/../x": r"'\.\.'",
    "s3://b//x": r"empty part",
}


@pytest.mark.parametrize("value", REFUSED)
def test_what_is_neither_is_refused_by_key_and_cure(value: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[value]) as caught:
        parse_config({"data": {"train": value}})
    assert SECRET not in str(caught.value)


def test_a_run_writes_to_this_machine_and_its_mirror_is_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: 's3://b/x' is a URI.*checkpoint\.mirror"):
        parse_config({"out": "s3://b/x"})
    for mirror in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(ConfigError, match="is the run's own folder"):
            parse_config({"out": str(tmp_path), "checkpoint": {"mirror": mirror}})
    refused = CliRunner().invoke(app, ["demo", "--out", "s3://b/x"])
    assert refused.exit_code == 2 and not Path("s3:").exists()


def test_hdfs_without_its_library_says_so() -> None:
    try:
        fs.HadoopFileSystem("localhost")
    except OSError:
        with pytest.raises(StorageError, match=r"hdfs://host:9000/: .*(libjvm|libhdfs)"):
            opened(parse_location("hdfs://host:9000/data"))


def rows(count: int) -> list[Row]:
    clip = encode_mp4(np.zeros((5, 16, 16, 3), np.uint8), 8.0)
    return [Row(f"r{i}", "procedural", "what next?", f"caption {i}", clip, clip) for i in range(count)]


def test_shards_at_a_uri_are_those_of_a_folder_and_appear_when_they_are_whole(tmp_path: Path) -> None:
    uri = parse_location(f"file://{tmp_path}/there")
    for folder in (tmp_path / "here", uri):
        with ShardWriter(folder, rows_per_shard=3) as writer:
            for row in rows(7):
                writer.write(row)
    names = [f"part-0000{n}.parquet" for n in range(3)]
    assert [p.name for p in shard_paths(uri)] == names == [p.name for p in shard_paths(tmp_path / "here")]
    for here, there in zip(shard_paths(tmp_path / "here"), shard_paths(uri), strict=True):
        assert Path(here).read_bytes() == (tmp_path / "there" / there.name).read_bytes()
        assert shard_digest(there, shard_metadata(there)) == shard_digest(here, shard_metadata(here))
    with pytest.raises(DataError, match="already holds a dataset"):
        ShardWriter(uri)
    with pytest.raises(RuntimeError), ShardWriter(parse_location(f"file://{tmp_path}/cut")) as writer:
        for row in rows(3):
            writer.write(row)
        raise RuntimeError
    assert listing(tmp_path / "cut") == []
    with pytest.raises(DataError, match=r"holds no \.parquet shards; did you mean a folder in it: here, there\?"):
        shard_paths(parse_location(f"file://{tmp_path}"))


def test_shards_of_other_writers_are_hashed_whole(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(rows(1)[0])
    table = pq.read_table(tmp_path / "part-00000.parquet").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "part-00000.parquet")
    (shard,) = shard_paths(parse_location(f"file://{tmp_path}"))
    expected = hashlib.sha256((tmp_path / "part-00000.parquet").read_bytes()).hexdigest()
    assert shard_digest(shard, shard_metadata(shard)) == expected


def test_an_import_to_a_uri_keeps_paths_inside_the_clips_folder(tmp_path: Path) -> None:
    clips, out = tmp_path / "clips", parse_location(f"file://{tmp_path}/out")
    clips.mkdir()
    (clips / "in.mp4").write_bytes(rows(1)[0].input_video)
    (tmp_path / "secret.mp4").write_bytes(rows(1)[0].input_video)
    (clips / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    names = ("in.mp4", "../secret.mp4", str(tmp_path / "secret.mp4"), "link.mp4", "s3://b/in.mp4", "file:///etc/passwd")
    lines = [{"id": n, "question": "q", "caption": "c", "input": n, "target": "in.mp4"} for n in names]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = import_jsonl(tmp_path / "m.jsonl", clips, out, quiet=True)
    assert report.accepted == 1 and [item.id for item in report.rejected] == list(names[1:])
    assert "must be a path inside" in (tmp_path / "out" / "_rejected.csv").read_text()
    with pytest.raises(ConfigError, match="is a URI"):
        import_jsonl(tmp_path / "m.jsonl", "s3://b/clips", tmp_path / "other")
    assert inspect(out, tmp_path / "sheet.png").rows == 1 and (tmp_path / "sheet.png").is_file()


def test_an_error_of_a_store_is_one_line_that_names_the_place() -> None:
    with pytest.raises(StorageError, match=r"^s3://b/x: there is no bucket 'b'; make it"):
        with storage_errors(parse_location("s3://b/x")):
            raise OSError("AWS Error NO_SUCH_BUCKET during …")
    with pytest.raises(StorageError, match=r"refuses the credentials of this environment"):
        with storage_errors("s3://b/x"):
            raise OSError("AWS Error ACCESS_DENIED during …\nmore")


def test_a_tilde_is_the_home_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("base: toy\nout: ~/runs/x\ndata: {train: ~/data}\n")
    run = load_config("~/run.yaml", ["checkpoint.mirror=~/mirror", "sft.vlm.out=~/sft"])
    assert (run.out, run.data.train) == (tmp_path / "runs" / "x", tmp_path / "data")
    assert (run.checkpoint.mirror, run.sft.vlm.out) == (tmp_path / "mirror", tmp_path / "sft")
    assert local_path("~") == tmp_path
    assert local_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert named("a=~/answers") == ("a", tmp_path / "answers")
    assert parse_config(parse_yaml(to_yaml(run), "here")) == run


def test_every_path_of_the_command_line_takes_a_tilde() -> None:
    """A shell leaves the tilde of ``--out=~/x`` alone; each option that takes a path goes through the one place."""
    for command in [*app.registered_commands, *data_commands.registered_commands]:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "pathlib" in str(hint):
                (option,) = hint.__metadata__
                assert option.parser is not None, (command.callback, name)


def test_no_home_for_a_tilde_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(LocationError, match="set HOME, or write the whole path"):
        local_path("~/x")
