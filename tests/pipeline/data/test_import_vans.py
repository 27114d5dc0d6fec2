"""VANS-Data in the layouts that its authors published: both languages, reasoning, paths of another machine, text files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.errors import DataError
from pipeline.cli import app
from pipeline.data.importers.vans import import_vans
from pipeline.data.video import encode_mp4
from rewards.format import parse_answer
from tests.pipeline.data.test_importers import rejected

EVALUATION = ("output_video_path", "input_video_path", "ENG_Instruction", "ENG_GT_Caption", "ENG_Think")
PROCEDURAL = (
    *("name", "recipe_type", "input_id", "input_video_path", "input_sentence", "input_dense_caption"),
    *("target_id", "target_video_path", "target_sentence", "target_dense_caption", "skipped_ids", "skipped_info"),
    *("Instruction", "Think", "GT_Caption"),
)
TEXT = """[Review]
- Instruction Compliance: Fail, [ENG Instruction] names a video
[CHN Instruction] 如果有人敲门会怎样？
[CHN Think] 门边有人。
[CHN GT Caption] 男人打开门。
[ENG Instruction] What if someone knocks?
[ENG Think] There is a man beside a door.
He would look who it is.
[ENG GT Caption] The man opens the door.
"""


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips" / "sub"
    folder.mkdir(parents=True)
    for name in ("in.mp4", "out.mp4"):
        (folder / name).write_bytes(encode_mp4(np.zeros((4, 16, 16, 3), np.uint8), 8.0))
    return folder.parent


def write(path: Path, header: tuple[str, ...], rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows(out: Path) -> list[dict]:
    return pq.read_table(out).to_pylist()


def pair(**more: str) -> dict[str, str]:
    return {
        "output_video_path": "./sub/out.mp4",
        "input_video_path": "/sub/in.mp4",
        "ENG_Instruction": "What is next?",
        "ENG_GT_Caption": "She adds salt.",
    } | more


def test_an_evaluation_file_without_names_is_imported_with_its_reasoning(clips: Path, tmp_path: Path) -> None:
    table = write(
        tmp_path / "eval.csv",
        EVALUATION,
        [
            pair(ENG_Think="The pan is hot."),
            pair(),
            pair(ENG_Think="</think> <ans>x</ans>"),
            pair(output_video_path=".."),
        ],
    )
    assert table.read_bytes().startswith(b"\xef\xbb\xbfoutput_video_path"), "the mark stands on the first column"
    out = tmp_path / "out"
    report = import_vans([table], clips, out, quiet=True)
    found = rows(out)
    assert [(row["id"], row["question"]) for row in found] == [
        ("sub/out", "What is next?"),
        ("sub/out#2", "What is next?"),
    ]
    answer = parse_answer(found[0]["answer"])
    assert answer is not None and (answer.thought, answer.caption) == ("The pan is hot.", "She adds salt.")
    assert found[1]["answer"] is None and found[0]["meta"] == "{}"
    assert report.accepted == 2 and "holds a tag of answers" in rejected(out)["sub/out"]


def test_the_procedural_pipelines_last_file_is_imported(clips: Path, tmp_path: Path) -> None:
    row = dict.fromkeys(PROCEDURAL, "x") | {
        "name": "video7",
        "input_id": "3",
        "target_id": "5",
        "input_video_path": "/data/authors/sub/in.mp4",
        "target_video_path": "/data/authors/sub/out.mp4",
        "Instruction": "What if it rains?",
        "Think": "t",
        "GT_Caption": "c",
    }
    table = write(tmp_path / "proc.csv", PROCEDURAL, [row, row | {"target_id": ""}])
    import_vans([table], clips, tmp_path / "out", strip="/data/authors", quiet=True)
    (found,) = rows(tmp_path / "out")
    assert (found["id"], found["kind"]) == ("video7_3_5", "procedural"), "the layout says the kind, not the question"
    assert rejected(tmp_path / "out") == {"video7_3": "target_id is empty"}
    with pytest.raises(DataError, match="input clip: no such clip"):
        import_vans([table], clips, tmp_path / "again", quiet=True)


def test_a_path_stays_inside_the_clips_folder_whatever_it_begins_with(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes((clips / "sub" / "in.mp4").read_bytes())
    for path in ("/../secret.mp4", "./../secret.mp4", "/home/me/../secret.mp4", "C:\\\\secret.mp4"):
        table = write(tmp_path / "t.csv", EVALUATION, [pair(input_video_path=path)])
        with pytest.raises(DataError, match="must be a path inside the clips folder"):
            import_vans([table], clips, tmp_path / "out", strip="/home/me/", quiet=True)


def test_chinese_columns_are_taken_when_asked_for(clips: Path, tmp_path: Path) -> None:
    header = (*EVALUATION, "CHN_Instruction", "CHN_GT_Caption")
    table = write(
        tmp_path / "both.csv",
        header,
        [
            pair(CHN_Instruction="下一步是什么？", CHN_GT_Caption="她加盐。"),
            pair(CHN_Instruction="然后？", CHN_GT_Caption="……"),
        ],
    )
    import_vans([table], clips, tmp_path / "chn", language="chn", quiet=True)
    (found,) = rows(tmp_path / "chn")
    assert (found["question"], found["caption"]) == ("下一步是什么？", "她加盐。")
    assert json.loads(found["meta"]) == {"language": "zh"}
    assert "no letter and no digit" in rejected(tmp_path / "chn")["sub/out"]
    english = write(tmp_path / "english.csv", EVALUATION, [pair()])
    with pytest.raises(DataError, match="no column CHN_Instruction, CHN_GT_Caption"):
        import_vans([english], clips, tmp_path / "none", language="chn", quiet=True)
    with pytest.raises(DataError, match="language 'fr' must be one of eng, chn"):
        import_vans([english], clips, tmp_path / "none", language="fr", quiet=True)


@pytest.mark.parametrize(
    ("language", "caption", "meta"),
    [("eng", "The man opens the door.", {}), ("chn", "男人打开门。", {"language": "zh"})],
)
def test_text_files_of_the_predictive_pipeline_are_imported(
    clips: Path, tmp_path: Path, language: str, caption: str, meta: dict[str, str]
) -> None:
    texts = tmp_path / "final"
    texts.mkdir()
    (texts / "pair_0001.txt").write_text(TEXT, encoding="utf-8")
    (texts / "pair_0002.txt").write_text("Video1: sub/in.mp4\nVideo2: sub/out.mp4\n\n" + TEXT, encoding="utf-8")
    (texts / "pair_0003.txt").write_text("PROHIBITED_CONTENT")
    (texts / "pair_0004.txt").write_text("[Instruction] a draft\n[GT Caption] that was not reviewed")
    (texts / "pair_0009.txt").write_text(TEXT, encoding="utf-8")
    table = tmp_path / "pairs.csv"
    table.write_text("video1_path,video2_path\nno.mp4,no.mp4\nsub/in.mp4,sub/out.mp4\n")
    out, command = tmp_path / "out", ["data", "import-vans", str(texts), "--clips", str(clips), "--pairs", str(table)]
    done = CliRunner().invoke(app, [*command, "--out", str(out), "--language", language])
    assert done.exit_code == 0, done.output
    found = rows(out)
    assert [(row["id"], row["kind"], row["caption"], json.loads(row["meta"])) for row in found] == [
        (name, "predictive", caption, meta) for name in ("pair_0001", "pair_0002")
    ]
    answer = parse_answer(found[0]["answer"])
    assert answer is not None and answer.caption == caption
    reasons = rejected(out)
    assert "refused" in reasons["pair_0003"] and f"[{language.upper()} Instruction]" in reasons["pair_0004"]
    assert "--pairs has no row 0009" in reasons["pair_0009"]


def test_wrong_sources_are_refused_with_what_would_be_right(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no text files \(\*\.txt\)"):
        import_vans([tmp_path / "empty"], clips, tmp_path / "o")
    text = tmp_path / "pair_0000.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match="give the CSV that the pairs were made from with --pairs"):
        import_vans([text], clips, tmp_path / "o")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="must have the columns video1_path and video2_path"):
        import_vans([text], clips, tmp_path / "o", pairs=wrong)
    text.write_bytes(b"x" * (2 << 20))
    with pytest.raises(DataError, match="larger than 1048576 bytes"):
        import_vans([text], clips, tmp_path / "o")
