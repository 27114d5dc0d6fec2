"""The importers: real manifests with real faults, paths that try to leave, and arbitrary bytes."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from pipeline.data.importers.clips import ClipSpec, confined, copy_clip
from pipeline.data.importers.cut import PairCut, cut_pairs
from pipeline.data.importers.importing import Candidate, Rejected, infer_kind
from pipeline.data.importers.jsonl import import_jsonl, read_entries
from pipeline.data.importers.vans import import_vans
from pipeline.data.importers.vans_csv import COLUMNS, read_rows
from pipeline.data.importers.vans_row import Reading
from pipeline.data.inspect import inspect
from pipeline.data.schema import SCHEMA, Row, ShardWriter
from pipeline.data.video import decode_video, encode_mp4, probe
from tests.pipeline.data.numbered import GOP, encoded, numbers

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clips folder inside a folder that holds a video of its own, which no manifest may reach."""
    root = tmp_path_factory.mktemp("world")
    folder = root / "clips"
    (folder / "sub").mkdir(parents=True)
    small = encode_mp4(np.random.default_rng(0).integers(0, 255, (8, 24, 32, 3), np.uint8), 8.0)
    (root / "secret.mp4").write_bytes(small)
    (folder / "in.mp4").write_bytes(small)
    (folder / "sub" / "out.mp4").write_bytes(small)
    (folder / "large.mp4").write_bytes(encode_mp4(np.zeros((6, 60, 100, 3), np.uint8), 8.0))
    (folder / "broken.mp4").write_bytes(small[:500])
    (folder / "link.mp4").symlink_to(root / "secret.mp4")
    (folder / "inner.mp4").symlink_to(folder / "in.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return folder


def write_csv(path: Path, rows: list[list[str]], header: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rejected(out: Path) -> dict[str, str]:
    with (out / "_rejected.csv").open(encoding="utf-8") as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


def test_a_vans_csv_is_imported_and_every_fault_is_listed(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = ["in.mp4", "sub/out.mp4"]
    table = write_csv(
        tmp_path / "vans.csv",
        [
            ["one", *sound, "What is the next step?", "She adds salt."],
            ["two", *sound, "What if it rains,\nthen?", "Café “wet”"],
            ["one", "sub\\out.mp4", "inner.mp4", "What happens next?", "A second question under one name."],
            ["name?", *sound, "#NAME?", "x"],
            ["nocap", *sound, "Q", "  "],
            ["gone", "gone.mp4", "in.mp4", "Q", "c"],
            ["broken", "in.mp4", "broken.mp4", "Q", "c"],
            ["up", "../secret.mp4", "in.mp4", "Q", "c"],
            ["deep", "sub/../../secret.mp4", "in.mp4", "Q", "c"],
            ["abs", str(clips.parent / "secret.mp4"), "in.mp4", "Q", "c"],
            ["drive", "C:\\in.mp4", "in.mp4", "Q", "c"],
            ["link", "link.mp4", "in.mp4", "Q", "c"],
            ["loop", "loop.mp4", "in.mp4", "Q", "c"],
            ["pipe", "pipe.mp4", "in.mp4", "Q", "c"],
            ["folder", "sub", "in.mp4", "Q", "c"],
            ["short", "in.mp4"],
            [],
        ],
    )
    assert table.read_bytes().startswith(b"\xef\xbb\xbf")
    out = tmp_path / "out"
    report = import_vans([table], clips, out, workers=2)
    rows = pq.read_table(out).to_pylist()
    assert [(row["id"], row["kind"]) for row in rows] == [
        ("one", "procedural"),
        ("two", "predictive"),
        ("one#2", "predictive"),
    ]
    assert rows[1]["caption"] == "Café “wet”" and rows[1]["source"].startswith("vans.csv:")
    assert rows[0]["input_video"] == (clips / "in.mp4").read_bytes(), "a small mp4 is stored as it is"
    reasons = rejected(out)
    assert set(reasons) == {row.id for row in report.rejected}
    for name, reason in {
        "name?": "spreadsheet's error",
        "nocap": "ENG_GT_Caption is empty",
        "gone": "input clip: no such clip",
        "broken": "target clip: broken video",
        "up": "must be a path inside",
        "deep": "must be a path inside",
        "abs": "no such clip",
        "drive": "must be a path inside",
        "link": "leads out of the clips folder",
        "pipe": "no such clip",
        "folder": "no such clip",
        "short": "output_video_path is empty",
    }.items():
        assert reason in reasons[name], name
    assert "loop" in reasons
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 rows imported (2 predictive, 1 procedural)" in printed and "13 rows rejected" in printed


def test_larger_clips_are_stored_as_smaller_copies(clips: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["a", "large.mp4", "in.mp4", "Q", "c"]])
    report = import_vans([table], clips, tmp_path / "out", spec=ClipSpec(max_side=50, embed_side=64), kind="predictive")
    row = pq.read_table(tmp_path / "out").to_pylist()[0]
    info = probe(row["input_video"])
    assert (info.width, info.height, info.frames, info.fps) == (50, 30, 6, 8.0)
    assert (report.copied, report.embedded, row["kind"]) == (1, 1, "predictive")


def test_a_copy_lasts_as_long_as_its_part_whatever_the_rate(tmp_path: Path) -> None:
    path = tmp_path / "slides.mkv"
    path.write_bytes(encoded(2, "matroska", times=[0, 2500], options={"crf": "1"}))
    info = probe(copy_clip(path, None, None, ClipSpec()))
    assert (info.frames, info.fps) == (2, pytest.approx(1 / 2500))
    for container in ("mpegts", "h264", "avi"):
        path = tmp_path / f"film.{container}"
        path.write_bytes(encoded(60, container, options=GOP))
        copy = copy_clip(path, 0.4, 1.6, ClipSpec())
        assert numbers(decode_video(copy, 30, 32, 64)) == list(range(10, 40)), container
        assert (probe(copy).frames, probe(copy).fps) == (30, pytest.approx(25, rel=1e-3))


def test_a_copy_of_a_clip_that_pauses_keeps_every_picture(tmp_path: Path) -> None:
    path = tmp_path / "screen.mkv"
    path.write_bytes(encoded(6, "matroska", times=[0, 0.1, 0.2, 0.3, 3.0, 3.1], options={"crf": "1"}))
    copy = copy_clip(path, None, None, ClipSpec())
    assert (probe(copy).frames, probe(copy).fps) == (32, pytest.approx(10))
    assert numbers(decode_video(copy, 32, 32, 64)) == [0, 1, 2] + [3] * 27 + [4, 5]
    path.write_bytes(encoded(60, "matroska", times=[k / 30 for k in range(60)], options={"crf": "1"}))
    assert probe(copy_clip(path, None, None, ClipSpec())).frames == 60, "milliseconds that are rounded are no pauses"


@pytest.mark.parametrize(("told", "disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_another_unicode_form(told: str, disk: str, tmp_path: Path) -> None:
    """Macs write "é" as two code points, most other programs as one; a folder and its manifest often come from two."""
    names = ["Café/Überfall.mp4", "한국어.mp4"]
    data = encode_mp4(np.random.default_rng(0).integers(0, 255, (4, 24, 32, 3), np.uint8), 8.0)
    for name in names:
        path = tmp_path / "clips" / unicodedata.normalize(disk, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    clips, written = tmp_path / "clips", [unicodedata.normalize(told, name) for name in names]
    line = {"question": "What happens next?", "caption": "c", "input": written[0], "target": {"path": written[1]}}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    assert import_jsonl(manifest, clips, tmp_path / "a", quiet=True).accepted == 1
    table = write_csv(tmp_path / "t.csv", [["one", *written, "What happens next?", "c"]])
    assert import_vans([table], clips, tmp_path / "b", quiet=True).accepted == 1
    cut = PairCut(
        name="one", file=written[1], input=(0, 0.2), target=(0.2, 0.5), kind="predictive", question="q", caption="c"
    )
    on_disk = unicodedata.normalize(disk, names[1])
    cut_pairs([cut], {on_disk: clips / on_disk}, tmp_path / "cut", tmp_path / "cut.csv")
    assert len(list((tmp_path / "cut").iterdir())) == 2
    with pytest.raises(DataError, match="no such clip"):
        confined(clips, unicodedata.normalize(told, "Café/Unterfall.mp4"))


def test_a_name_spelled_as_on_disk_goes_first_and_a_choice_of_two_is_refused(tmp_path: Path) -> None:
    spellings = ["\u1e68.mp4", "S\u0323\u0307.mp4", "\u1e62\u0307.mp4"]  # one letter with marks below and above
    for name in spellings[:2]:
        (tmp_path / name).write_bytes(b"x")
    assert len({*os.listdir(tmp_path)}) == 2 and len({unicodedata.normalize("NFC", name) for name in spellings}) == 1
    assert [confined(tmp_path, name).name for name in spellings[:2]] == spellings[:2]
    with pytest.raises(DataError, match="could be any of 2 files, whose names look the same"):
        confined(tmp_path, spellings[2])


def test_files_that_are_no_vans_csv_are_refused_at_once(clips: Path, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", [["a", "b"]], header=("name", "video"))
    with pytest.raises(
        DataError, match=r"other\.csv is no file of VANS-Data: .*no column input_video_path.*It has: name, video"
    ):
        import_vans([other], clips, tmp_path / "o1")
    with pytest.raises(DataError, match="no such CSV"):
        import_vans([tmp_path / "none.csv"], clips, tmp_path / "o2")
    good = write_csv(tmp_path / "good.csv", [["a", "in.mp4", "in.mp4", "Q", "c"]])
    with pytest.raises(DataError, match="clips folder"):
        import_vans([good], tmp_path / "none", tmp_path / "o3")
    with pytest.raises(DataError, match="kind 'x' must be one of procedural, predictive"):
        import_vans([good], clips, tmp_path / "o4", kind="x")
    bad = write_csv(tmp_path / "bad.csv", [["a", "gone.mp4", "in.mp4", "Q", "c"]])
    with pytest.raises(DataError, match=r"(?s)nothing could be imported.*bad\.csv:2 a: input clip: no such clip"):
        import_vans([bad], clips, tmp_path / "o5")
    import_vans([good], clips, tmp_path / "o6", quiet=True)
    with pytest.raises(DataError, match="already holds a dataset"):
        import_vans([good], clips, tmp_path / "o6")


def test_a_manifest_of_parts_is_imported_and_faults_are_listed(clips: Path, tmp_path: Path) -> None:
    part = {"path": "in.mp4", "start": 0.25, "end": 0.75}
    lines = [
        {"id": "a", "question": "What if?", "caption": "c", "input": part, "target": "sub/out.mp4", "meta": {"k": [1]}},
        {
            "kind": "procedural",
            "question": "q",
            "caption": "c",
            "input": "in.mp4",
            "target": "in.mp4",
            "answer": "<think>",
        },
        {"id": "typo", "question": "q", "caption": "c", "input": "in.mp4", "target": "in.mp4", "captoin": "c"},
        {"id": "kind", "kind": "other", "question": "q", "caption": "c", "input": "in.mp4", "target": "in.mp4"},
        {"id": "order", "question": "q", "caption": "c", "input": {**part, "end": 0.1}, "target": "in.mp4"},
        {"id": "late", "question": "q", "caption": "c", "input": {**part, "start": 9, "end": 10}, "target": "in.mp4"},
        {"id": "up", "question": "q", "caption": "c", "input": "../secret.mp4", "target": "in.mp4"},
        [1, 2],
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n{broken\n", encoding="utf-8")
    report = import_jsonl(path, clips, tmp_path / "out", quiet=True)
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert [(row["id"], row["kind"]) for row in rows] == [("a", "predictive"), ("line-000003", "procedural")]
    assert json.loads(rows[0]["meta"]) == {"k": [1]} and rows[1]["answer"] == "<think>" and rows[0]["answer"] is None
    assert probe(rows[0]["input_video"]).frames == 4, "seconds 0.25 to 0.75 of 8 frames a second"
    reasons = {item.id: item.reason for item in report.rejected}
    assert "captoin" in reasons["typo"] and "kind" in reasons["kind"] and "must be later" in reasons["order"]
    assert "no frames between start and end" in reasons["late"] and "inside the clips folder" in reasons["up"]
    assert len(report.rejected) == 7


def test_several_manifests_give_one_folder_of_distinct_ids(clips: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        entry = {"question": name, "caption": "c", "input": "in.mp4", "target": "in.mp4"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(entry) + "\n" + json.dumps(entry | {"id": "mine"}))
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    assert import_jsonl(paths, clips, tmp_path / "out", quiet=True).accepted == 4
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table["id"].to_pylist() == ["line-000001", "mine", "line-000001#2", "mine#2"]
    assert table["question"].to_pylist() == ["one", "one", "two", "two"]


def test_inspect_counts_measures_and_draws(clips: Path, tmp_path: Path) -> None:
    table = write_csv(
        tmp_path / "t.csv",
        [
            ["a", "in.mp4", "in.mp4", "What if?", "one two"],
            ["b", "in.mp4", "sub/out.mp4", "Next step?", "one two three"],
        ],
    )
    import_vans([table], clips, tmp_path / "set" / "train", quiet=True)
    report = inspect(tmp_path / "set" / "train")
    assert (report.rows, dict(report.kinds)) == (2, {"predictive": 1, "procedural": 1})
    assert report.caption_words == (2, 2.5, 3) and not report.broken
    assert dict(report.sizes) == {"32x24, 8 fps, h264": 4}
    assert report.sheet is not None and report.sheet.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="did you mean a folder in it: train"):
        inspect(tmp_path / "set")
    with pytest.raises(DataError, match="does not exist"):
        inspect(tmp_path / "nowhere")


def test_the_writer_keeps_to_the_schema(tmp_path: Path) -> None:
    row = Row("a", "procedural", "q", "c", b"v", b"v")
    with ShardWriter(tmp_path / "set", rows_per_shard=2) as writer:
        writer.write(row)
        with pytest.raises(DataError, match="two rows have the id 'a'"):
            writer.write(row)
        for name in "bcd":
            writer.write(
                {"id": name, "kind": "predictive", "question": "q", "caption": "c"}
                | dict.fromkeys(("input_video", "target_video"), b"v")
            )
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "_complete.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert pq.read_schema(tmp_path / "set" / "part-00000.parquet").remove_metadata().equals(SCHEMA)
    for wrong in ({"kind": "x"}, {"caption": " "}, {"meta": "[1]"}, {"meta": "{"}, {"input_video": b""}):
        with pytest.raises(DataError, match="row 'a'"):
            Row(**{**row.__dict__, **wrong})
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "half") as writer:
        writer.write(row)
        raise ZeroDivisionError
    assert not list((tmp_path / "half").glob("*")), "a failed import leaves no shard that looks complete"


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What is the next step?", "procedural"),
        ("How do I continue?", "procedural"),
        ("What if the lid stays open?", "predictive"),
        ("What happens next?", "predictive"),
        ("what will the dog do", "predictive"),
    ],
)
def test_the_kind_follows_the_question(question: str, kind: str) -> None:
    assert infer_kind(question) == kind


@FUZZ
@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(["..", "/", "sub", "in.mp4", "link.mp4", "\\", "~"])).map("".join)
)
def test_fuzz_no_path_leaves_the_clips_folder(clips: Path, text: str) -> None:
    try:
        found = confined(clips, text)
    except DataError:
        return
    assert found.is_relative_to(clips.resolve()) and found.is_file()


@FUZZ
@given(body=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_fuzz_any_bytes_after_a_header_are_rows_or_reasons(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "fuzz.csv"
    path.write_bytes(b"\xef\xbb\xbf" + ",".join(COLUMNS).encode() + b"\r\n" + body)
    for item in read_rows(path, Reading()):
        assert isinstance(item, Candidate) or (isinstance(item, Rejected) and item.reason)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "question", "caption", "input", "target", "path", "start", "meta"]), inner
        )
    ),
    max_leaves=12,
)


@FUZZ
@given(body=st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_fuzz_any_manifest_line_is_an_entry_or_a_reason(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(body + b"\n[[[" + b"[" * 100_000)
    items = list(read_entries(path))
    assert all(isinstance(item, (Candidate, Rejected)) for item in items)
    assert isinstance(items[-1], Rejected)
