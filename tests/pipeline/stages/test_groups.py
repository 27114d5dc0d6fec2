"""Totals, advantages and metrics of a batch, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from actors.records import Completion, Sample, Scores
from cluster.errors import TrainingError
from pipeline.stages.groups import MAX_EMPTY_BATCHES, FailureBudget, Group, Member, assemble

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)
OPTIONS = {"std_norm": "group", "normalise_rewards": False, "min_group": 2, "trained_version": 3}


def member(index: int, version: int = 3, caption: str | None = None, **values: float) -> Member:
    completion = Completion(
        "", np.arange(4, dtype=np.int32), np.zeros(4, np.float32), "length" if index else "stop", version
    )
    return Member(
        index, f"c{index}" if caption is None else caption, Scores("s", index, values), completion, None, version
    )


def group(name: str, *members: Member, failures: tuple[str, ...] = ()) -> Group:
    return Group(Sample(name, "predictive", "q", "c", FRAMES, FRAMES), members, failures)


def test_weighted_totals_and_group_advantages() -> None:
    batch = assemble([group("a", member(0, x=1.0, y=0.0), member(1, x=0.0, y=1.0))], {"x": 2.0, "y": 1.0}, **OPTIONS)
    np.testing.assert_allclose(batch.totals[0], [2.0, 1.0])
    np.testing.assert_allclose(batch.advantages[0], [0.5 / (0.5 + 1e-4), -0.5 / (0.5 + 1e-4)])
    assert batch.metrics["reward/total_mean"] == pytest.approx(1.5)
    assert batch.metrics["reward/x_mean"] == pytest.approx(0.5)
    assert batch.metrics["alarm/corr_x_y"] == pytest.approx(-1.0)
    assert batch.metrics["rollout/truncated_ratio"] == pytest.approx(0.5)


def test_the_truncated_share_is_of_completions_that_met_the_length_limit() -> None:
    members = [member(i, x=float(i)) for i in range(4)]  # all but the first met it
    batch = assemble([group("a", *members)], {"x": 1.0}, **OPTIONS)
    assert batch.metrics["rollout/truncated_ratio"] == pytest.approx(0.75)
    batch = assemble([group("a", member(0, x=0.0), member(0, x=1.0))], {"x": 1.0}, **OPTIONS)
    assert batch.metrics["rollout/truncated_ratio"] == 0.0


def test_quarantined_samples_and_groups_that_shrank_are_dropped_and_counted() -> None:
    whole = group("a", member(0, x=1.0), member(1, x=0.0), failures=("a scorer failed",))
    batch = assemble([whole, None, group("b", member(0, x=1.0))], {"x": 1.0}, **OPTIONS)
    assert [g.sample.id for g in batch.groups] == ["a"]
    assert batch.metrics["rollout/dropped_groups"] == 2
    assert batch.metrics["rollout/failed_members"] == 1


def test_equal_rewards_carry_no_gradient_and_are_counted() -> None:
    flat = group("a", member(0, x=0.3, caption="same"), member(1, x=0.3, caption="same"))
    batch = assemble([flat, group("b", member(0, x=1.0), member(1, x=0.0))], {"x": 1.0}, **OPTIONS)
    assert batch.advantages[0].tolist() == [0.0, 0.0]
    assert batch.metrics["advantage/zero_std_ratio"] == 0.5
    assert batch.metrics["rollout/unique_caption_ratio"] == pytest.approx(0.75)


def test_staleness_is_the_age_of_the_weights() -> None:
    batch = assemble([group("a", member(0, version=1, x=1.0), member(1, version=3, x=0.0))], {"x": 1.0}, **OPTIONS)
    assert batch.metrics["rollout/staleness_mean"] == 1.0


def test_a_batch_without_groups_has_no_reward_metrics() -> None:
    batch = assemble([None], {"x": 1.0}, **OPTIONS)
    assert batch.groups == () and "reward/total_mean" not in batch.metrics


def test_normalised_rewards_weigh_by_weight_and_not_by_spread() -> None:
    values = [{"x": 100.0, "y": 0.0}, {"x": 0.0, "y": 1.0}, {"x": 50.0, "y": 0.5}]
    groups = [group("a", *(member(i, **v) for i, v in enumerate(values)))]
    weights = {"x": 1.0, "y": 2.0}
    raw = assemble(groups, weights, **OPTIONS)
    even = assemble(groups, weights, **(OPTIONS | {"normalise_rewards": True}))
    assert np.argmax(raw.totals[0]) == 0  # the noisy component decides …
    assert np.argmax(even.totals[0]) == 1  # … until its weight does
    root = np.sqrt(1.5)
    np.testing.assert_allclose(even.totals[0], [root - 2 * root, 2 * root - root, 0.0], atol=5e-3)


@pytest.mark.parametrize(
    ("std_norm", "divisors"),
    [("group", (0.5, 2.0)), ("batch", (np.std([0.0, 1.0, 0.0, 4.0]),) * 2), ("none", (1.0, 1.0))],
)
def test_std_norm_says_what_divides_advantages(std_norm: str, divisors: tuple[float, float]) -> None:
    groups = [group("a", member(0, x=0.0), member(1, x=1.0)), group("b", member(0, x=0.0), member(1, x=4.0))]
    batch = assemble(groups, {"x": 1.0}, **(OPTIONS | {"std_norm": std_norm}))
    for advantages, half, divisor in zip(batch.advantages, (0.5, 2.0), divisors):
        np.testing.assert_allclose(advantages, [-half / divisor, half / divisor], rtol=1e-3)


def test_what_is_lost_is_counted_by_reason_and_bounded() -> None:
    budget = FailureBudget("stage1", 0.1)
    whole = group("a", *(member(i, x=float(i)) for i in range(4)))
    short = group("b", *(member(i, x=float(i)) for i in range(3)), failures=("the reward is nan",))
    for _ in range(10):
        assert budget.count([whole, short]) == {"the reward is nan": 1}
    assert budget.asked == 80 and budget.lost == {"the reward is nan": 10}  # few trajectories are no share yet
    with pytest.raises(TrainingError, match=r"(?s)11 of 84 .*max_failed_ratio=0.1.*11 × the reward is nan"):
        budget.count([short])
    barren, lost = FailureBudget("stage2", 1.0), [group(n, failures=("a broken frame",) * 4) for n in "ab"]
    for batch in (lost, lost, lost, lost, [whole], lost, lost, lost, lost):  # one odd batch after another, but not five
        barren.count(batch)
    with pytest.raises(
        TrainingError, match=r"(?s)stage2: not one trajectory of 5 batches in a row.*72 × a broken frame"
    ):
        barren.count(lost)
    before = FailureBudget("stage2", 1.0)
    assert before.count([whole], ["no anchor"] * 4) == {"no anchor": 4} and before.asked == 8
    assert FailureBudget("stage2", 0.0).count([]) == {}  # a refill that found no anchor loses nothing


def test_batches_of_which_nothing_was_asked_are_not_barren() -> None:
    budget = FailureBudget("stage2", 0.0)
    for _ in range(2 * MAX_EMPTY_BATCHES):
        assert budget.count([]) == {} and budget.count([None]) == {}  # refills that found no anchor
    assert budget.empty_batches == 0
