"""docs/vans.md from its first command to its last: a tiny release is imported, asked, evaluated, trained further and asked again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.pipeline.release.walk import COMMANDS, ROOT, build_folders

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

SMALL = {
    "train": [
        *("stage1.steps=1", "stage1.rollout.prompts_per_step=2", "stage1.rollout.group_size=4"),
        *("stage2.steps=1", "stage2.rollout.prompts_per_step=1", "stage2.rollout.group_size=4"),
        "stage2.anchor_min_rouge=0",  # random weights say nothing that is true
        "learner.ranks=1",
        "pools.vdm.workers=1",
    ],
    "evaluate": ["evaluate.samples=3", "pools.vdm.workers=1"],
}
"""What a run on two cores changes of the page's commands, beside the placement."""


def tried(words: list[str], folder: Path) -> str:
    """Run a command of the page in ``folder`` at tiny size, and return what it prints."""
    words = [word.replace("vans_1gpu", "toy") for word in words] + SMALL.get(words[0], [])
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, f"vans {' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.timeout(2400)
def test_every_command_of_the_page_does_what_it_says(
    ray_alone: None, tmp_path: Path, tiny_qwen25_dir: Path, tiny_vdm_dir: Path, tiny_clip_dir: Path, toy_shards: Path
) -> None:
    build_folders(tmp_path, tiny_qwen25_dir, tiny_vdm_dir, tiny_clip_dir, toy_shards)
    (tmp_path / "answers").mkdir()
    for words in COMMANDS:
        tried(words, tmp_path)
    answers = {path.name for path in (tmp_path / "answers").glob("*.mp4")}
    assert answers == {"answer.mp4", "after.mp4"}
    assert "ROUGE-L" in (tmp_path / "runs" / "released" / "table.md").read_text()
    for role in ("vlm", "vdm"):
        folder = tmp_path / "runs" / "release" / f"{role}_adapter"
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == {"vlm": 4, "vdm": 16}[role]
        assert any(
            t.abs().max() > 0 for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in n
        )
