"""Which rows teach reinforcement learning something: the reason of each, and which of many are kept."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from actors.records import Sample, Scores
from cluster.errors import DataError
from pipeline.evaluate.selecting import JudgedRows
from pipeline.evaluate.selection import (
    ANCHOR,
    FLAT,
    KEPT,
    LOST,
    NOT_NEEDED,
    REASONS,
    Verdict,
    as_csv,
    choose,
    counts,
    judge,
)
from pipeline.stages.groups import Group, Member
from pipeline.stages.stage2 import Anchor

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)
GOOD = Anchor("<ans>it falls</ans>", "it falls", 0.9)


def group(*rewards: float, failures: tuple[str, ...] = (), text: list[float] | None = None) -> Group:
    members = tuple(
        Member(i, "c", Scores("a", i, {"clip_v": reward} | ({"rouge_l": text[i]} if text else {})))
        for i, reward in enumerate(rewards)
    )
    return Group(Sample("a", "predictive", "q", "it falls", FRAMES, FRAMES), members, failures)


def verdict(found: Group, anchor: Anchor = GOOD, weights: dict[str, float] | None = None) -> Verdict:
    return judge(7, found, anchor, weights or {"clip_v": 2.0}, normalise=False, min_group=2, min_rouge=0.6)


def test_a_group_whose_rewards_differ_and_whose_anchor_passes_is_kept_with_its_figures() -> None:
    found = verdict(group(0.2, 0.6))
    assert (found.row, found.id, found.why, found.scored) == (7, "a", KEPT, 2)
    assert found.reward == pytest.approx(0.8) and found.spread == pytest.approx(0.4)  # weighted by 2
    assert found.components["clip_v"] == pytest.approx((0.4, 0.2))
    assert (found.anchor, found.anchor_rouge_l) == ("it falls", 0.9)


def test_each_reason_is_told_apart() -> None:
    assert verdict(group(0.5, 0.5)).why == FLAT
    assert (
        verdict(group(0.0, 1.0, text=[1.0, 0.0]), weights={"clip_v": 1.0, "rouge_l": 1.0}).why == FLAT
    )  # the sum decides
    few = verdict(group(0.5, failures=("too dark", "too dark", "too long")))
    assert (few.why, few.told, few.scored) == (LOST, "too dark", 1)
    assert verdict(group()).why == LOST
    far = verdict(group(0.1, 0.9), Anchor("", "it rises", 0.2))
    assert far.why == ANCHOR and "ROUGE-L 0.200" in far.told and far.anchor_rouge_l == 0.2
    none = verdict(group(0.1, 0.9), Anchor("no tags", None, 0.0))
    assert none.why == ANCHOR and none.anchor is None and "no caption" in none.told


def test_the_largest_spreads_are_chosen_and_the_order_is_the_rows() -> None:
    rows = [Verdict(i, str(i), KEPT, spread=spread) for i, spread in enumerate([0.1, 0.4, 0.2, 0.4, 0.4])]
    rows.insert(2, Verdict(9, "flat", FLAT, spread=0.0))
    found = choose(rows, 2)
    assert [(v.id, v.why) for v in found] == [
        ("0", NOT_NEEDED),
        ("1", KEPT),
        ("flat", FLAT),
        ("2", NOT_NEEDED),
        ("3", KEPT),
        ("4", NOT_NEEDED),
    ]  # of equal ones the first
    assert counts(found) | {KEPT: 2, NOT_NEEDED: 3, FLAT: 1} == counts(found) and list(counts(found)) == list(REASONS)
    assert choose(rows, 99) == rows


def test_the_table_has_every_row_with_its_components() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv([verdict(group(0.2, 0.6)), verdict(group())]))))
    assert lines[0]["clip_v_mean"] == "0.4" and float(lines[0]["clip_v_spread"]) == pytest.approx(0.2)
    assert (lines[1]["why"], lines[1]["clip_v_mean"], lines[1]["spread"]) == (LOST, "", "")


def test_a_journal_goes_on_after_what_a_kill_left_and_refuses_another_selection(tmp_path) -> None:
    path, facts = tmp_path / "_judged.jsonl", {"rows": "1"}
    first = JudgedRows(path, facts)
    first.add(verdict(group(0.2, 0.6)))
    first.add(verdict(group()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # the last line was cut short
    again = JudgedRows(path, facts)
    assert again.verdicts == first.verdicts[:1]
    again.add(first.verdicts[1])
    assert path.read_bytes() == whole and JudgedRows(path, facts).verdicts == first.verdicts
    with pytest.raises(DataError, match=r"other rows, models or settings; give another --out"):
        JudgedRows(path, {"rows": "2"})
    assert json.loads(whole.splitlines()[1])["why"] == KEPT
