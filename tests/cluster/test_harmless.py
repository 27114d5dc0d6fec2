"""Text of strangers on consoles, in tables and on pictures; passwords nowhere."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.markdown import Markdown
from typer.testing import CliRunner

from cluster.errors import DataError, VansError
from cluster.harmless import file_slug, in_markup, parse_json, printable, redacted, short
from pipeline.checkpoint import TrainState
from pipeline.config import load_config, to_yaml
from pipeline.data.importers.cut import read_cuts
from pipeline.data.importers.importing import Rejected
from pipeline.data.importers.jsonl import import_jsonl, read_entries
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.video import encode_mp4
from pipeline.evaluate.predictions import Prediction, read_predictions, write_predictions
from pipeline.evaluate.table import markdown_grid
from pipeline.tracking import Tracker, TrackingError

NASTY = [
    "[bold]x[/bold]",
    "[/]",
    "<script>alert(1)</script>",
    "| pipe |",
    "two\nlines",
    "\x1b[31mred",
    "\u202eright",
    "\ud800",
    "\x9b1m",
]
FRAMES = np.zeros((3, 16, 16, 3), np.uint8)


def shown(write: object) -> str:
    stream = io.StringIO()
    write(Console(file=stream, force_terminal=True, color_system=None, width=200))  # type: ignore[operator]
    return stream.getvalue()


@pytest.mark.parametrize("text", NASTY)
def test_a_console_shows_text_as_it_is_and_no_control_reaches_the_terminal(text: str) -> None:
    out = shown(lambda console: console.print(f"[bold]{in_markup(text)}[/] after", highlight=False))
    assert out.strip("\n") == f"{printable(text)} after"
    assert not any(c in out for c in "\x1b\x9b\u202e\ud800")


def test_printable_keeps_every_script_and_bounds_length() -> None:
    for text in ("größer – 最後 – مرحبا – שלום – 👩🏽‍🍳", "tab\tand\nline"):
        assert printable(text) == text
    assert printable("x" * 10**6, 50) == "x" * 49 + "…"
    assert len(short([["x" * 1000] * 1000] * 1000)) <= 200


@pytest.mark.parametrize("text", NASTY)
def test_a_name_cannot_break_out_of_a_markdown_table(text: str) -> None:
    lines = markdown_grid(["", text], [["metric", text]]).splitlines()
    assert len(lines) == 3 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<script" not in "".join(lines)
    assert "\x1b[31mred" not in shown(lambda console: console.print(Markdown("\n".join(lines))))


def test_pictures_take_any_text_in_bounded_time(tmp_path: Path) -> None:
    long = ["x" * 200_000, "word " * 50_000, "\u0661" * 5000]
    began = time.monotonic()
    contact_sheet(
        [(text, [Strip(f"{text}\n{text}", FRAMES, text)]) for text in [*NASTY, *long]],
        tmp_path / "sheet.png",
        title="a\nb\x1b",
    )
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", [*NASTY, "../../up", "/etc/passwd", "a\0b", "x" * 5000, "CON", "", "."])
def test_ids_become_plain_file_names(name: str, tmp_path: Path) -> None:
    slug = file_slug(name)
    assert slug and len(slug) <= 64 and not set(slug) & set("/\\.:\0\n")
    if "\ud800" not in name:  # no text that could have been read from a file
        write_predictions(tmp_path / "in", [Prediction(name, "a \u2028 b \x85 c", frames=FRAMES)], 8.0)
        assert [(p.id, p.caption) for p in read_predictions(tmp_path / "in")] == [(name, "a \u2028 b \x85 c")]
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


def test_reasons_of_an_import_carry_no_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_bytes(encode_mp4(FRAMES, 8.0))
    rows = [
        {"id": i, "question": "q", "caption": "c", "input": "a.mp4", "target": t}
        for i, t in (("good", "a.mp4"), ("\x1b[31m[/]", "\x1b]0;x\x07"))
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    import_jsonl(tmp_path / "m.jsonl", tmp_path, tmp_path / "out")
    out = capsys.readouterr().out
    assert "\\x1b[31m[/]" in out and "\x1b" not in out


def test_errors_of_the_command_line_are_plain_and_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import cli
    from pipeline.commands import doctor

    def fail(_: object) -> None:
        raise VansError("[/] \x1b[31m at postgresql://me:s3cret@db/x")

    monkeypatch.setattr(doctor, "run_doctor", fail)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 2 and "error: [/] \\x1b[31m at postgresql://me:***@db/x" in result.output


SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "pw-5d1f",
    "HF_TOKEN": "hf-77aa",
    "RAY_AUTH_TOKEN": "ray-0b3c",
    "AWS_SECRET_ACCESS_KEY": "aws-91e2",
}


def test_no_secret_of_the_environment_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = load_config("toy", [f"out={tmp_path / 'run'}"])
    with pytest.raises(RuntimeError), Tracker.start(config) as tracker, tracker.stage("stage1"):
        tracker.log_clip(FRAMES, "a caption", 0)
        raise RuntimeError("lost postgresql://me:db-44c1@db/x")
    TrainState.of(config, "stage1", 1).save(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"a caption" in written
    for secret in (*SECRETS.values(), "db-44c1"):
        assert secret.encode() not in written


def test_a_password_in_a_tracking_address_is_refused_or_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        redacted("sqlite:////a/b:c@d") == "sqlite:////a/b:c@d" and redacted("http://u:p@h:1/x") == "http://u:***@h:1/x"
    )
    with pytest.raises(VansError, match=r"http://me:\*\*\*@host") as refused:
        load_config("toy", ["tracking.uri=http://me:s3cret@host"])
    assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@127.0.0.1:1")
    with pytest.raises(TrackingError) as unreachable:
        Tracker.start(load_config("toy", [f"out={tmp_path / 'run'}"]))
    assert "me:***@127.0.0.1" in str(unreachable.value) and "s3cret" not in str(unreachable.value)


def test_a_key_that_stands_twice_in_a_person_s_json_is_named(tmp_path: Path) -> None:
    twice = '{"id": "a", "caption": "x", "video": null, "caption": "y"}'
    assert parse_json('{"a": [{"b": 1}, {"b": 1}]}') == {"a": [{"b": 1}, {"b": 1}]}
    with pytest.raises(ValueError, match="the key 'caption' stands twice"):
        parse_json(twice)
    (tmp_path / "predictions.jsonl").write_text(f"{twice}\n")
    with pytest.raises(DataError, match=r"line 1: not JSON \(the key 'caption' stands twice"):
        read_predictions(tmp_path)
    (entry,) = read_entries(tmp_path / "predictions.jsonl")
    assert isinstance(entry, Rejected)
    assert "the key 'caption' stands twice" in entry.reason
    (tmp_path / "cuts.json").write_text(f"[{twice}]")
    with pytest.raises(DataError, match="the key 'caption' stands twice"):
        read_cuts(tmp_path / "cuts.json")
