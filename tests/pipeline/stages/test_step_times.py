"""Where a step's time went: the arithmetic, and what is read back of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.pool.spec import Meter
from cluster.errors import ConfigError
from pipeline.config import parse_config, to_yaml
from pipeline.stages.step_times import profile
from pipeline.tracking import Tracker
from pipeline.tracking.profile import read_profiles, summarise, tables


def pools(**totals: tuple[float, float, float]) -> dict[str, float]:
    names = ("busy_total_s", "worker_total_s", "queue_wait_total_s")
    return {f"pool/{pool}/{n}": v for pool, values in totals.items() for n, v in zip(names, values, strict=True)}


def test_busy_and_idle_seconds_of_two_pools_and_what_bounds_them() -> None:
    before, after = (
        pools(vlm=(1.0, 5.0, 2.0), vdm=(0.0, 10.0, 0.0)),
        pools(vlm=(3.0, 15.0, 4.5), vdm=(16.0, 30.0, 40.0)),
    )
    times = {"time/update_s": 1.0, "time/publish_s": 0.5}
    found = profile(before, after, times, 10.0, overlaps=False)
    assert (
        found["profile/vlm/busy_s"] == 2.0 and found["profile/vlm/idle_s"] == 8.0 and found["profile/vlm/wait_s"] == 2.5
    )
    assert found["profile/vdm/busy_s"] == 16.0 and found["profile/vdm/idle_s"] == 4.0
    assert found["profile/lower_bound_s"] == 8.0 + 1.5  # two VDM workers with 16 s of work, then the update
    assert found["profile/gap_s"] == 0.5 and found["profile/gap_ratio"] == pytest.approx(0.05)
    assert profile(before, after, times, 10.0, overlaps=True)["profile/lower_bound_s"] == 8.0


def test_a_meter_adds_up_what_its_workers_did() -> None:
    meter = Meter()
    for now, busy, alive in ((0.0, 0, 2), (1.0, 2, 2), (4.0, 1, 2), (6.0, 0, 3), (10.0, 0, 3)):
        meter.busy(busy, alive, now)
    assert meter.busy_total_s == 2 * 3 + 1 * 2 and meter.worker_total_s == 2 * 6 + 3 * 4


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 9)), min_size=1, max_size=3),
    st.floats(0.1, 50),
    st.floats(0, 20),
    st.booleans(),
)
def test_no_bound_is_above_the_step(
    work: list[tuple[float, int]], step_s: float, update_s: float, overlaps: bool
) -> None:
    after = pools(**{f"p{i}": (min(busy, n * step_s), n * step_s, 0.0) for i, (busy, n) in enumerate(work)})
    found = profile(pools(), after, {"time/update_s": update_s}, step_s, overlaps=overlaps)
    assert 0.0 <= found["profile/lower_bound_s"] <= step_s and 0.0 <= found["profile/gap_ratio"] <= 1.0
    for i, (_, n) in enumerate(work):
        assert found[f"profile/p{i}/busy_s"] + found[f"profile/p{i}/idle_s"] == pytest.approx(n * step_s)


def test_the_first_step_is_left_out_and_the_parts_add_up() -> None:
    series = {
        "profile/step_s": [(0, 50.0), (1, 10.0), (2, 20.0)],
        "profile/lower_bound_s": [(0, 1.0), (1, 9.0), (2, 18.0)],
        "profile/vdm/busy_s": [(1, 16.0), (2, 32.0)],
        "profile/vdm/idle_s": [(1, 4.0), (2, 8.0)],
        "time/wait_s": [(0, 49.0), (1, 8.0), (2, 16.0)],
        "time/update_s": [(1, 1.0), (2, 2.0)],
    }
    found = summarise("stage1", series)
    assert found is not None and found.steps == 2 and found.step_s == 15.0
    assert sum(found.parts.values()) == pytest.approx(found.step_s)
    assert found.bottleneck == "vdm" and found.pools["vdm"].busy == 0.8 and "vdm=N" in found.advice()
    last = summarise("stage1", series, last=1)
    assert last is not None and last.step_s == 20.0
    assert summarise("stage1", {}) is None


def test_speeds_are_read_back_and_an_unknown_one_is_null() -> None:
    series = {
        "profile/step_s": [(0, 50.0), (1, 10.0), (2, 20.0)],
        "speed/vdm/latents_per_s": [(0, 1.0), (1, 30.0), (2, 50.0)],
        "speed/vdm/flops_per_s": [(1, 2e12), (2, 4e12)],
        "speed/vdm/mfu": [(1, 0.2), (2, 0.4)],
        "speed/learner/vlm/tokens_per_s": [(2, 7.0)],
    }
    found = summarise("all_in_one", series)
    assert found is not None
    assert found.as_json()["speeds"] == {
        "vdm": {"unit": "latents", "per_s": 40.0, "flops_per_s": 3e12, "mfu": pytest.approx(0.3)},
        "learner/vlm": {"unit": "tokens", "per_s": 7.0, "flops_per_s": None, "mfu": None},
    }
    from rich.console import Console

    shown = io.StringIO()
    Console(width=120, file=shown).print(tables([found]))
    words = [line.split() for line in shown.getvalue().splitlines()]
    assert ["vdm", "40", "latents", "3", "T", "30.0%"] in words and ["learner/vlm", "7", "tokens", "–", "–"] in words


def test_a_run_is_profiled_from_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run's folder"):
        read_profiles(tmp_path)
    config = parse_config({"name": "toy", "out": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(ConfigError, match="no step of this run"):
        read_profiles(tmp_path)
    with Tracker.start(config) as tracker, tracker.stage("stage1"):
        for step in range(3):
            figures = profile(pools(), pools(vdm=(6.0, 20.0, 1.0)), {"time/update_s": 2.0}, 10.0, overlaps=False)
            tracker.log_metrics(figures | {"time/update_s": 2.0, "time/wait_s": 7.5}, step)
    (found,) = read_profiles(tmp_path)
    assert (found.stage, found.steps, found.step_s, found.lower_bound_s) == ("stage1", 2, 10.0, 5.0)
    assert found.gap_ratio == 0.5 and "max_staleness" in found.advice()
    from rich.console import Console

    console = Console(width=120, record=True, quiet=True)
    console.print(tables([found]))
