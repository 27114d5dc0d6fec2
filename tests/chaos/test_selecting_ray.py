"""`vans data select` with the tiny pair: rows with a gradient alone, and the same ones after an interruption."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import load_config
from pipeline.data.toy.shards import write_toy
from pipeline.evaluate.selecting import JUDGED, TABLE, run_selection
from pipeline.evaluate.selection import KEPT

pytestmark = [pytest.mark.chaos, pytest.mark.vllm]


def rows_of(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.timeout(900)
def test_a_selection_that_was_interrupted_keeps_the_same_rows(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy", train=20, test=8, seed=3)
    settings = [f"data.train={tmp_path / 'toy' / 'train'}", "stage1.rollout.group_size=4", "deterministic=true"]
    config = load_config("toy", settings)
    found = run_selection(config, 5, tmp_path / "rl")
    assert len(found) == 20
    kept = [verdict for verdict in found if verdict.why == KEPT]
    assert 1 <= len(kept) <= 5 and all(verdict.spread and verdict.anchor_rouge_l >= 0.6 for verdict in kept)
    rows = rows_of(tmp_path / "rl")
    assert [row["id"] for row in rows] == [verdict.id for verdict in kept]
    assert [json.loads(row["meta"])["rl"]["spread"] for row in rows] == [verdict.spread for verdict in kept]
    source = {row["id"]: row for row in rows_of(tmp_path / "toy" / "train")}
    assert all(row["input_video"] == source[row["id"]]["input_video"] for row in rows)
    with (tmp_path / "rl" / TABLE).open(newline="") as file:
        assert [line["why"] for line in csv.DictReader(file)] == [verdict.why for verdict in found]

    half = b"".join((tmp_path / "rl" / JUDGED).read_bytes().splitlines(keepends=True)[:9])
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / JUDGED).write_bytes(half + b'{"row": 8, "id"')  # as a kill leaves it
    assert run_selection(config, 5, tmp_path / "again") == found
    assert rows_of(tmp_path / "again") == rows
