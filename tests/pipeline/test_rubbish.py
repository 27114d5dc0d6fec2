"""Rubbish in every file that a person may hand us: it is read, rejected with a reason, or one of our errors says what is wrong.

Never another exception, and never a hang: each example has a deadline. The examples are the same in every run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.errors import CheckpointError, ConfigError, DataError, VansError
from pipeline.checkpoint import CheckpointStore, TrainState
from pipeline.config import load_config
from pipeline.data.decoder import Shard, VideoShape, block_items, decode_block
from pipeline.data.importers.cut import read_cuts
from pipeline.data.importers.jsonl import import_jsonl
from pipeline.data.importers.vans import import_vans
from pipeline.data.importers.vans_csv import COLUMNS
from pipeline.data.schema import SCHEMA, shard_metadata
from pipeline.data.source import SampleSource
from pipeline.data.video import VideoLimits, decode_video, encode_mp4
from pipeline.evaluate.predictions import read_predictions
from pipeline.reproduce.spec import load_experiment

rubbish = settings(
    derandomize=True,
    database=None,
    max_examples=25,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
FRAMES = np.full((3, 16, 16, 3), 90, np.uint8)
CLIP = encode_mp4(FRAMES, 8.0)
SECRET = encode_mp4(FRAMES + 90, 8.0)
NASTY = [
    "",
    "..",
    "../clip.mp4",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "C:\\a.mp4",
    "..\\a",
    "out",
    "loop",
    "\u202e",
    "clip.mp4",
]

text = st.text(max_size=30) | st.sampled_from(NASTY)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=6)
raw = st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass"))


@contextmanager
def folder() -> Iterator[Path]:
    """A folder with a clip, a link out of it and a link to itself."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "in")
        path.mkdir()
        (path / "clip.mp4").write_bytes(CLIP)
        Path(name, "secret.mp4").write_bytes(SECRET)
        (path / "out").symlink_to(Path(name, "secret.mp4"))
        (path / "loop").symlink_to("loop")
        yield path


# --- configuration ---------------------------------------------------------------------------------------------------

SECTIONS = [
    "name",
    "seed",
    "out",
    "models",
    "video",
    "data",
    "stage1",
    "pools",
    "cluster",
    "tracking",
    "evaluate",
    "alarms",
]


@rubbish
@given(
    raw
    | st.dictionaries(st.sampled_from(SECTIONS) | text, values, max_size=3).map(lambda v: yaml.safe_dump(v).encode())
)
@example(b"[" * 20_000)
@example(b"seed: 2026-13-45")
@example(b"seed: 0b")
@example(b"? [a]\n: b")
@example(b"seed: !!python/object/apply:os.system ['true']")
@example(
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 110))
)
def test_a_configuration(content: bytes) -> None:
    with folder() as path:
        (path / "run.yaml").write_bytes(content)
        try:
            load_config(path / "run.yaml")
        except ConfigError as error:
            told = str(error)
        else:
            told = ""
        assert len(told) < 20_000


@rubbish
@given(
    st.lists(
        text
        | st.builds(lambda k, v: f"{k}={v}", st.sampled_from([*SECTIONS, "stage1.grpo.clip_low", "a.b"]) | text, text),
        max_size=3,
    )
)
@example(["seed=[" + "[" * 20_000])
@example(["seed=1.e400"])
def test_overrides(overrides: list[str]) -> None:
    try:
        load_config("toy", overrides)
    except ConfigError:
        pass


@pytest.mark.parametrize("source", NASTY)
def test_names_of_configurations_and_experiments(source: str) -> None:
    for load in (load_config, load_experiment):
        with pytest.raises(VansError):
            load(source)


# --- importers and predictions ---------------------------------------------------------------------------------------

entry = st.fixed_dictionaries(
    {"question": values, "caption": values, "input": values, "target": values},
    optional={"id": values, "kind": values, "answer": values, "meta": values, "other": values},
)
good_text = st.fixed_dictionaries(
    {"question": st.just("what ?"), "caption": st.just("it rises"), "input": text, "target": text}
)


@rubbish
@given(st.lists(raw | (entry | good_text).map(lambda v: json.dumps(v).encode()), max_size=4))
@example([b"[" * 20_000, b'{"id": ' + b"9" * 5000 + b"}", b"\xff\xfe"])
def test_a_manifest(lines: list[bytes]) -> None:
    with folder() as path:
        (path / "m.jsonl").write_bytes(b"\n".join(lines))
        try:
            report = import_jsonl(path / "m.jsonl", path, path / "shards", workers=1, quiet=True)
        except DataError:
            return
        assert report.accepted
        only_its_own_clip_was_taken(path / "shards")


def only_its_own_clip_was_taken(shards: Path) -> None:
    for row in pq.read_table(shards / "part-00000.parquet").to_pylist():
        assert row["input_video"] == row["target_video"] == CLIP != SECRET


@rubbish
@given(raw, st.lists(st.lists(text, min_size=5, max_size=6), max_size=4))
@example(b"", [["a", "clip.mp4", name, "what ?", "it rises"] for name in ("clip.mp4", "out", "../secret.mp4", "loop")])
@example(b'"' + b"x" * 200_000, [])
def test_a_csv_of_vans(tail: bytes, rows: list[list[str]]) -> None:
    lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
    content = "\n".join([",".join(COLUMNS), *lines, ""]).encode("utf-8", "surrogatepass") + tail
    with folder() as path:
        for number, data in enumerate((content, tail)):
            (path / "t.csv").write_bytes(data)
            try:
                import_vans([path / "t.csv"], path, path / f"shards{number}", workers=1, quiet=True)
            except DataError:
                continue
            only_its_own_clip_was_taken(path / f"shards{number}")


@rubbish
@given(raw | values.map(lambda v: json.dumps(v).encode()))
def test_cuts(content: bytes) -> None:
    with folder() as path:
        (path / "cuts.json").write_bytes(content)
        try:
            read_cuts(path / "cuts.json")
        except DataError:
            pass


answer = st.fixed_dictionaries(
    {"id": values, "caption": values, "video": values}, optional={"text": values, "index": values}
)


@rubbish
@given(st.lists(raw | answer.map(lambda v: json.dumps(v).encode()), max_size=3))
@example([b'{"id": "\\ud800", "caption": "", "video": null}'])
@example([b'{"id": "a", "caption": "", "video": "loop"}'])
@example([b'{"id": "a", "caption": "", "video": "out"}'])
@example([b'{"id": "a", "caption": "", "video": "' + b"x" * 5000 + b'"}'])
@example([b'{"id": "a", "index": ' + b"9" * 5000 + b"}", b"[" * 20_000])
def test_predictions(lines: list[bytes]) -> None:
    with folder() as path:
        (path / "predictions.jsonl").write_bytes(b"\n".join(lines))
        try:
            found = read_predictions(path)
        except DataError:
            return
        assert all(p.video is None or p.video == (path / "clip.mp4").resolve() for p in found)


# --- video and shards ------------------------------------------------------------------------------------------------


@rubbish
@given(
    st.binary(max_size=400),
    st.lists(st.tuples(st.integers(0, len(CLIP) - 1), st.integers(0, 255)), max_size=20),
    st.integers(0, len(CLIP)),
)
def test_bytes_for_a_video(noise: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(CLIP)
    for place, value in changes:
        damaged[place] = value
    for data in (
        noise,
        bytes(damaged),
        CLIP[:cut],
        CLIP[:40] + noise,
        b"GIF89a" + noise,
        b"RIFF\xff\xff\xff\x7fAVI " + noise,
    ):
        try:
            frames = decode_video(data, 3, 16, 16, VideoLimits(max_pixels=1 << 20, max_decode_s=3.0))
        except DataError:
            continue
        assert frames.shape == (3, 16, 16, 3)


ROW: dict[str, Any] = {
    "id": "a", "kind": "predictive", "question": "what ?", "caption": "it rises", "input_video": CLIP, "target_video": CLIP,
    "source": "x:1", "meta": "{}", "answer": None,
}  # fmt: skip
TYPES = [pa.string(), pa.binary(), pa.int64(), pa.list_(pa.string()), pa.float32(), pa.large_string()]


@rubbish
@given(
    st.dictionaries(st.sampled_from(SCHEMA.names), st.none() | st.sampled_from(TYPES), max_size=3),
    st.dictionaries(st.sampled_from(SCHEMA.names), st.none() | text, max_size=3),
    raw,
    st.integers(0, 3000),
)
def test_parquet_of_other_schemas_and_values(
    types: dict[str, Any], cells: dict[str, Any], noise: bytes, cut: int
) -> None:
    with folder() as path:
        row = {
            **ROW,
            **{
                k: v.encode("utf-8", "replace") if isinstance(v, str) and k.endswith("video") else v
                for k, v in cells.items()
            },
        }
        names = [name for name in SCHEMA.names if types.get(name, "") is not None]
        fields = [pa.field(name, types.get(name) or SCHEMA.field(name).type) for name in names]
        columns = []
        for field in fields:
            try:
                columns.append(pa.array([row[field.name]] * 2, field.type))
            except (pa.ArrowException, TypeError, ValueError):
                columns.append(pa.nulls(2, field.type))
        shard = path / "part-00000.parquet"
        pq.write_table(pa.table(columns, pa.schema(fields)), shard)
        read_shards(path, shard)
        whole = shard.read_bytes()
        for data in (noise, whole[:cut], whole[:40] + noise + whole[40:], noise + whole[len(noise) :]):
            shard.write_bytes(data)
            read_shards(path, shard)


def read_shards(path: Path, shard: Path) -> None:
    shape = VideoShape(num_frames=3, height=16, width=16, input_frames=2, vlm_height=16, vlm_width=16)
    try:
        shard_metadata(shard)
        SampleSource(path, shape)
    except DataError:
        return
    places = {name: np.array([0, 0]) for name in ("shard", "group", "epoch")}
    places |= {name: np.array([0, 1]) for name in ("offset", "row", "position")}
    block = decode_block(places, (Shard.of(shard),), shape, VideoLimits(max_pixels=1 << 20))
    assert len(list(block_items(block, shape, [shard]))) == 2  # a sample, or quarantined with its reason


# --- checkpoints -----------------------------------------------------------------------------------------------------

KEYS = ["stage", "step", "sequence", "files", "cursor", "config", "extra", "mlflow_run_ids"]
objects = raw | st.dictionaries(st.sampled_from(KEYS), values, max_size=5).map(lambda v: json.dumps(v).encode())
files = st.dictionaries(text, st.fixed_dictionaries({"size": values, "sha256": values}), max_size=2)
manifests = files.map(lambda f: json.dumps({"stage": "s", "step": 1, "sequence": 1, "files": f}).encode())


@rubbish
@given(objects | manifests, objects)
@example(b"[" * 20_000, b"[" * 20_000)
@example(
    json.dumps(
        {"stage": "s", "step": 1, "sequence": 1, "files": {"../../secret.mp4": {"size": 1, "sha256": ""}}}
    ).encode(),
    b"",
)
@example(
    json.dumps({"stage": "s", "step": 1, "sequence": 1, "files": {"x" * 5000: {"size": 1, "sha256": ""}}}).encode(),
    b"{}",
)
def test_manifests_and_states(manifest: bytes, state: bytes) -> None:
    with folder() as path:
        checkpoint = path / "stage1-step000001"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").write_bytes(manifest)
        (checkpoint / "train_state.json").write_bytes(state)
        store = CheckpointStore(path)
        for attempt in (lambda: store.load(checkpoint), store.latest, lambda: TrainState.read(checkpoint), store.prune):
            try:
                attempt()
            except CheckpointError:
                pass
