"""The demo's own judgement, and its second run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import VansError
from pipeline.commands.demo import demo_config, judge, set_aside
from pipeline.config import load_config
from pipeline.reproduce.spec import load_experiment

SFT = {"clip_v": 0.4, "drawable": 0.3, "rouge_l": 0.5}
BETTER = {"clip_v": 0.7, "drawable": 0.5, "rouge_l": 0.6}


@pytest.mark.parametrize("other", [{}, {"rouge_l": SFT["rouge_l"]}])
def test_a_demo_that_won_is_content(other: dict[str, float]) -> None:
    judge({"evaluation": {"sft": SFT, "joint_grpo": BETTER | other}})


@pytest.mark.parametrize(
    "worse", [{"clip_v": 0.3}, {"clip_v": 0.4}, {"drawable": 0.1}, {"drawable": 0.3}, {"rouge_l": 0.4}]
)
def test_a_demo_that_lost_or_only_drew_level_says_where(worse: dict[str, float]) -> None:
    with pytest.raises(VansError, match=next(iter(worse))):
        judge({"evaluation": {"sft": SFT, "joint_grpo": BETTER | worse}})


def test_an_earlier_demo_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert set_aside(out) is None
    out.mkdir()
    (out / "notes.txt").write_text("a folder that no run made")
    assert set_aside(out) is None
    (out / "config.yaml").write_text("name: demo")
    kept = set_aside(out)
    assert kept is not None and (kept / "notes.txt").is_file() and not out.exists()


def test_quick_is_the_same_run_with_fewer_steps(tmp_path: Path) -> None:
    whole, quick = (demo_config(tmp_path / "demo", 3, flag) for flag in (False, True))
    assert (quick.stage1.steps, quick.stage2.steps, quick.seed) == (2, 2, 3)
    assert whole.stage1.model_copy(update={"steps": 2}) == quick.stage1


def test_its_stage_two_is_the_tables_row_by_nft(tmp_path: Path) -> None:
    """What the table measured at equal time is what the demo runs; its length is the toy run's."""
    row = load_experiment("table").rows["joint_nft"].set
    assert row is not None
    measured = load_config("toy", [change for change in row if not change.startswith("stage1.")]).stage2
    demo = demo_config(tmp_path / "demo", 0, quick=False).stage2
    assert demo.objective == "nft" and demo.model_copy(update={"steps": measured.steps}) == measured
