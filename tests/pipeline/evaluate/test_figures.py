"""Intervals and paired comparisons with known answers: nothing to find, something planted, and noise."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.bootstrap import estimate
from pipeline.evaluate.figures import Answered, Bleu, Frechet, Mean, Measure, difference_of, measure, value_of
from pipeline.evaluate.table import METRICS, SIGNS, build_table
from rewards.frechet import frechet_distance
from tests.rewards.corpus import bleu

WORDS = ["the", "red", "blue", "circle", "square", "rises", "falls", "slowly", "quickly", "then", "grows", "shrinks"]
N, DIM = 60, 4
EVERY = [measure(name, "test") for name in (*METRICS, *SIGNS)]


def answers(seed: int, n: int = N, *, lift: float = 0.0, noise: float = 0.05, world: int = 0) -> list[Answered]:
    """A system on the samples of ``world``: its numbers are the samples' own, plus ``lift``, plus its own noise."""
    hard, own = np.random.default_rng(world), np.random.default_rng((7, seed))
    found = []
    for i in range(n):
        ease = hard.uniform(0.2, 0.6)
        truth, words = hard.normal(size=DIM), hard.choice(WORDS, size=6)
        said = [w if own.random() < ease + lift else own.choice(WORDS) for w in words]
        values = {name: ease + lift + noise * own.normal() for name in (*METRICS, *SIGNS)}
        features = {"clip": truth + (0.6 - lift) * (1.0 + 0.3 * own.normal(size=DIM)), "target": truth}
        kind = ("procedural", "predictive")[i % 2]
        found.append(Answered(f"s{i}", 0, kind, " ".join(said), " ".join(words), values, features))
    return found


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_a_system_is_exactly_as_good_as_itself(how: Measure) -> None:
    found = difference_of(how, answers(1), answers(1), seed=3)
    assert found is not None
    assert (found.value, found.low, found.high, found.n, found.differ) == (0.0, 0.0, 0.0, N, 0)


@pytest.mark.parametrize("how", [Mean("clip_v"), Bleu(4), Frechet("test")], ids=str)
def test_a_planted_improvement_is_found_and_noise_is_not(how: Measure) -> None:
    sign = -1.0 if isinstance(how, Frechet) else 1.0  # a distance shrinks
    found = difference_of(how, answers(1, lift=0.3), answers(2), seed=0)
    assert found is not None and found.low is not None and found.high is not None
    assert min(sign * found.low, sign * found.high) > 0 and found.differ > N / 2
    # Two systems that differ by chance alone: at 95% about one comparison in twenty is off.
    covered = 0
    for seed in range(12):
        by_chance = difference_of(how, answers(100 + seed), answers(200 + seed), seed=seed)
        assert by_chance is not None and by_chance.low is not None and by_chance.high is not None
        covered += by_chance.low <= 0 <= by_chance.high
    assert covered >= 10


def test_pairing_finds_what_two_intervals_hide() -> None:
    """The samples' own difficulty is in both systems: it drops out of the difference, not out of the intervals."""
    better, worse, how = answers(1, lift=0.04), answers(2), Mean("clip_v")
    a, b, d = value_of(how, better, 0), value_of(how, worse, 0), difference_of(how, better, worse, 0)
    assert a and b and d and a.low and b.high and d.low
    assert a.low < b.high, "apart they overlap"
    assert d.low > 0, "sample by sample they do not"
    assert d.value == pytest.approx(a.value - b.value)


def test_only_samples_of_both_are_compared() -> None:
    found = difference_of(Mean("clip_v"), answers(1)[:40], answers(1)[10:], seed=0)
    assert found is not None and (found.n, found.value) == (30, 0.0)
    assert difference_of(Mean("clip_v"), answers(1)[:20], answers(1)[20:], seed=0) is None
    assert difference_of(Frechet("x"), answers(1)[:20], answers(1)[19:], seed=0) is None, "one clip is no distribution"


def test_values_are_those_of_the_whole_set() -> None:
    found = answers(5)
    for order in (1, 4):
        estimate = value_of(Bleu(order), found, 0)
        assert estimate is not None and estimate.low is not None and estimate.high is not None
        expected = bleu([a.caption for a in found], [a.reference for a in found])[f"bleu_{order}"]
        assert estimate.value == pytest.approx(expected) and estimate.low < expected < estimate.high
    distance = value_of(Frechet("test"), found, 0)
    features = [np.stack([a.features[side] for a in found]) for side in ("clip", "target")]
    assert distance is not None and distance.value == pytest.approx(frechet_distance(*features, "test").value)  # type: ignore[call-arg]


def test_the_interval_of_a_frechet_distance_is_as_wide_as_its_spread() -> None:
    """Against the distances of fresh sets of as many clips: their mean is covered, and the width is theirs."""
    fresh = [value_of(Frechet("test"), answers(w, world=w), w) for w in range(40)]
    values = np.array([e.value for e in fresh if e is not None])
    widths = np.array([e.high - e.low for e in fresh if e is not None and e.high is not None and e.low is not None])
    assert widths.mean() == pytest.approx(2 * 1.96 * values.std(), rel=0.35)
    inside = np.mean([e.low <= values.mean() <= e.high for e in fresh])  # type: ignore[union-attr,operator]
    assert inside >= 0.8


def test_a_table_compares_the_first_and_the_last_in_every_metric_and_kind() -> None:
    table = build_table({f"system {i}": answers(i) for i in range(3)}, "test")
    assert table.compare == ("system 0", "system 2")
    assert set(table.comparison) == {"all", "procedural", "predictive"}
    for found in table.comparison.values():
        assert set(found) == {*METRICS, *SIGNS}
        assert all(d.low is not None and d.high is not None and d.low < d.high for d in found.values())


def test_an_interval_of_known_numbers() -> None:
    """The statistic is the number that was drawn first, even over 0 … 1000: 2.5% lie below 25, 2.5% above 975."""

    def first(draws: np.ndarray) -> np.ndarray:
        return draws[:, 0].astype(float)

    found = estimate(first, 1001, seed=0, resamples=4000)
    assert (found.value, found.n) == (0.0, 1001) and found.low is not None and found.high is not None
    assert found.low == pytest.approx(25, abs=12) and found.high == pytest.approx(975, abs=12)
    centred = estimate(first, 1001, seed=0, resamples=4000, centred=True)
    assert centred.low == pytest.approx(25 - 500, abs=30) and centred.high == pytest.approx(975 - 500, abs=30)
    seen: list[int] = []
    estimate(lambda d: (seen.append(len(d)), first(d))[1], 7, seed=0, resamples=250)
    assert sum(seen[1:]) == 250  # after the value itself
    one = estimate(first, 1, seed=0)
    assert (one.low, one.high) == (None, None)
    with pytest.raises(ValueError, match="at least one sample"):
        estimate(first, 0, seed=0)


@pytest.mark.parametrize(("how", "least"), [(Mean("clip_v"), 1), (Bleu(1), 1), (Frechet("x"), 2)])
def test_a_metric_needs_so_many_samples_and_no_more(how: Measure, least: int) -> None:
    enough, few = answers(1)[:least], answers(1)[: least - 1]
    assert value_of(how, enough, 0) is not None and value_of(how, few, 0) is None
    assert difference_of(how, enough, enough, 0) is not None and difference_of(how, enough, few, 0) is None
