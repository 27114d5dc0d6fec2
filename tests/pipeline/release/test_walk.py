"""docs/vans.md: what needs no engine is done as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import load_config
from pipeline.data.folder import open_dataset
from pipeline.release.clone import ROWS
from tests.pipeline.release.walk import COMMANDS, TEXT, build_folders

pytestmark = pytest.mark.slow


def test_the_page_walks_from_import_to_a_trained_pair() -> None:
    names = [words[0] if words[0] != "data" else words[1] for words in COMMANDS]
    wanted = ["import-release", "answer", "import-vans", "evaluate", "plan", "train", "answer"]
    assert [names.index(name) for name in wanted[:-1]] == sorted(names.index(name) for name in wanted[:-1])
    assert names[-1] == "answer"
    assert all(f"`{file}`" in TEXT for file in {row.file for row in ROWS.values()})


def test_a_release_is_imported_and_its_run_resolved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_qwen25_dir: Path,
    tiny_vdm_dir: Path,
    tiny_clip_dir: Path,
    toy_shards: Path,
) -> None:
    build_folders(tmp_path, tiny_qwen25_dir, tiny_vdm_dir, tiny_clip_dir, toy_shards)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    told = {}
    for words in COMMANDS:
        if words[0] in ("import-release", "data"):
            words = [word.replace("vans_1gpu", "toy") for word in words]
        elif words[0] == "train":
            words = [*words, "--dry-run"]
        else:
            continue
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
        told[" ".join(words[:2])] = result.output
    assert (
        "not used" not in told["import-release VANS"] and "merged into the whole model" in told["import-release VANS"]
    )
    assert f"wrote {tmp_path}/release/run.yaml" in told["import-release VANS"]
    assert "[Think]" in told["train release/run.yaml"]
    run = load_config("release/run.yaml")
    assert run.models.vlm == f"{tmp_path}/release/vlm"
    assert (open_dataset("data/vans/rl/test").rows, open_dataset("data/vans/rl/train").rows) == (3, 4)
