"""docs/metrics.md and the code name the same metrics."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from actors.pool.spec import PoolStats
from pipeline.tracking.metrics import FAMILIES, find, glossary
from rewards.signs import frame_diagnostics

ROOT = Path(__file__).resolve().parents[3]
METRICS = [metric for family in FAMILIES for metric in family.metrics]


def test_glossary_is_what_the_code_declares() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == glossary(), "run: make docs"


def test_every_metric_says_how_to_read_it_and_is_declared_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.unit and metric.meaning.endswith(".") and metric.reading.endswith("."), metric.name


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("reward/clip_v_mean", "reward/<component>_mean"),
        ("reward/my.module:brightness_std", "reward/<component>_std"),
        ("reward/total_mean", "reward/total_mean"),
        ("alarm/corr_clip_v_rouge_l", "alarm/corr_<a>_<b>"),
        ("learner/logp_diff_t07", "learner/logp_diff_t<step>"),
        ("learner/logp_diff_p0016", "learner/logp_diff_p<position>"),
        ("eval/joint_grpo/clip_v", "eval/<system>/<metric>"),
    ],
)
def test_a_name_finds_its_most_literal_entry(name: str, declared: str) -> None:
    metric = find(name)
    assert metric is not None and metric.name == declared


@pytest.mark.parametrize("name", ["reward/total", "pool/vlm/mood", "reward/_mean", "loss", "time/step_s/x"])
def test_what_is_not_declared_is_not_found(name: str) -> None:
    assert find(name) is None


def test_figures_of_pools_and_clips_are_declared() -> None:
    numbers = [f.name for f in dataclasses.fields(PoolStats) if f.type in ("int", "float", int, float)]
    assert len(numbers) > 10
    noise = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    names = [f"pool/vdm/{name}" for name in numbers] + [f"alarm/{name}" for name in frame_diagnostics(noise, noise)]
    assert [name for name in names if find(name) is None] == []


def test_no_entry_describes_what_is_never_logged() -> None:
    """Every literal name, or its last part where it is put together, stands somewhere in the code."""
    files = [path for room in ("pipeline", "actors", "rewards") for path in (ROOT / room).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files if path.name != "metrics.py")
    unused = [metric.name for metric in METRICS if metric.name.rpartition("/")[2].partition("<")[0] not in code]
    assert unused == []
