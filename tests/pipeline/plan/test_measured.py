"""Service times of a run that was, read from a real MLflow store and a ``pools.jsonl``, against hand calculations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from pipeline.config import load_config, to_yaml
from pipeline.control.trace import read_trace
from pipeline.plan.balance import Demand
from pipeline.plan.demands import as_measured
from pipeline.plan.measured import busy_per_request, incomparable, per_request, read_run
from pipeline.tracking import Tracker


def point(done: int, busy_ratio: float, ready: int = 2) -> dict[str, float]:
    return {"done": done, "busy_ratio": busy_ratio, "ready": ready}


def test_times_come_from_totals_and_from_the_trace(tmp_path: Path) -> None:
    config = load_config("toy", [f"out={tmp_path}/run", "learner.ranks=2"])
    config.out.mkdir()
    (config.out / "config.yaml").write_text(to_yaml(config))
    prompts, group = 8, 8
    with Tracker.start(config) as tracker, tracker.stage("stage1"):
        for step in range(3):
            tracker.log_metrics(
                {
                    "pool/vdm/done": 40.0 * (step + 1),
                    "pool/vdm/service_total_s": 100.0 + 60.0 * step,  # the first value holds the evaluation too
                    "pool/reward/done": 64.0 * (step + 1),
                    "pool/reward/service_total_s": 8.0 * (step + 1),
                    "time/update_s": [9.0, 4.0, 6.0][step],
                    "time/publish_s": 0.25,
                },
                step,
            )
    trace = [{"time": float(t), "pools": {"vlm": point(8 * t // 10, 0.5)}} for t in (0, 10, 20)]
    (config.out / "pools.jsonl").write_text("\n".join(json.dumps(line) for line in trace) + '\n{"time": 3')
    assert busy_per_request(read_trace(config.out / "pools.jsonl"), "vlm", (0.0, 1e9)) == pytest.approx(20.0 / 16)

    found = read_run(config.out, config)
    assert found.unit_s["stage1", "draw"] == pytest.approx(60 / 40)
    assert found.per_step["stage1", "draw"] == pytest.approx(40 / prompts)  # of 64 captions, 40 were drawn
    assert found.unit_s["stage1", "score"] == pytest.approx(8 / 64)
    assert found.unit_s["stage1", "learn"] == pytest.approx(6.0 * 2 / (prompts * group))  # the median, times two ranks
    assert found.unit_s["stage1", "publish"] == 0.25
    assert ("stage1", "think") not in found.unit_s  # the trace is of 1970, not of stage 1's time

    draw = as_measured(Demand("draw", "vdm", 128, 9.9, source="FLOPs"), "stage1", 16, found)
    assert (draw.units, draw.unit_s, draw.source) == (80.0, 1.5, "measured")
    guess = Demand("anchor", "vlm", 8, 0.1, source="FLOPs")
    assert as_measured(guess, "stage2", 8, found) is guess


def test_a_resumed_run_counts_anew() -> None:
    series = {
        "pool/vdm/done": [(0, 10.0), (1, 20.0), (2, 10.0), (3, 30.0)],
        "pool/vdm/service_total_s": [(0, 5.0), (1, 15.0), (2, 4.0), (3, 24.0)],
    }
    assert per_request(series, "vdm") == (pytest.approx(30 / 30), pytest.approx(15.0))
    assert per_request({}, "vdm") is None
    lines = [{"time": t, "pools": {"vdm": point(done, 1.0, 1)}} for t, done in ((0, 50), (10, 60), (20, 2), (30, 12))]
    assert busy_per_request(lines, "vdm", (0, 99)) == pytest.approx(20 / 20)
    assert busy_per_request(lines, "vlm", (0, 99)) is None


def test_only_a_run_of_the_same_work_stands_in(tmp_path: Path) -> None:
    toy = load_config("toy")
    more = load_config(
        "toy", ["learner.ranks=8", "pools.vdm.workers=9", "stage1.rollout.prompts_per_step=64", "seed=3"]
    )
    assert incomparable(toy, more) == []
    larger = load_config("toy", ["video.height=64", "stage2.render.steps=20", "models.flow_shift=5"])
    assert incomparable(toy, larger) == ["models.flow_shift", "stage2.render.steps", "video.height"]
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        read_run(tmp_path, toy)
    (tmp_path / "config.yaml").write_text(to_yaml(toy))
    with pytest.raises(ConfigError, match=r"nothing is recorded there.*pools\.jsonl"):
        read_run(tmp_path, toy)
    assert not (tmp_path / "mlflow.db").exists()  # looking made nothing
    with pytest.raises(ConfigError, match=r"differs in video\.height"):
        read_run(tmp_path, load_config("toy", ["video.height=64"]))
