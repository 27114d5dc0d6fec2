"""Learning rates against torch's own schedulers, and how a batch is cut into optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from actors.learner.batches import plan_batch, prompts_read, split_groups
from actors.learner.settings import OptimSection
from actors.learner.spec import learning_rate
from tests.actors.learner.toy_policy import experiences

TOTAL, WARMUP = 12, 3


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_learning_rates_are_torchs(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    span = TOTAL - warmup
    after = {
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=span),
        "linear": lambda: LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=span),
    }[schedule]
    scheduler = after()
    if warmup:
        climb = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        scheduler = SequentialLR(optimizer, [climb, after()], milestones=[warmup])
    expected = []
    for _ in range(TOTAL):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    spec = OptimSection(lr=0.4, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(spec, step, TOTAL) for step in range(TOTAL)] == pytest.approx(expected, abs=1e-9)
    assert expected[0] == pytest.approx(0.4 / warmup if warmup else 0.4)


def test_updates_split_whole_groups_evenly_and_in_order() -> None:
    items = experiences(5, 3)
    parts = split_groups(items, 2)
    assert [[i.sample_id for i in part] for part in parts] == [
        ["s0"] * 3 + ["s1"] * 3,
        ["s2"] * 3 + ["s3"] * 3 + ["s4"] * 3,
    ]
    assert [len(part) for part in split_groups(items, 9)] == [3] * 5  # never more steps than groups
    plans = plan_batch(items, ranks=2, micro_batch=2, updates=2)
    for step in range(2):
        counts = {len(plan[step]) for plan in plans}
        assert len(counts) == 1  # every rank runs as many micro-batches, or the collective hangs
        seen = [i for plan in plans for micro in plan[step] if micro.real for i in micro.items]
        assert sorted((i.sample_id, i.index) for i in seen) == [(i.sample_id, i.index) for i in parts[step]]


@pytest.mark.parametrize(
    ("groups", "size", "ranks", "micro"), [(8, 4, 2, 16), (8, 4, 2, 3), (5, 3, 4, 2), (1, 2, 3, 1), (3, 8, 1, 8)]
)
def test_groups_stay_as_whole_as_ranks_and_micro_batches_allow(groups: int, size: int, ranks: int, micro: int) -> None:
    items = experiences(groups, size)
    plans = plan_batch(items, ranks=ranks, micro_batch=micro, updates=1)
    pieces = [piece for plan in plans for piece in plan[0]]
    assert all(len(piece.items) <= micro for piece in pieces)
    seen = [i for piece in pieces if piece.real for i in piece.items]
    assert [(i.sample_id, i.index) for i in seen] == [(i.sample_id, i.index) for i in items]  # in order: rank by rank
    sizes = [sum(len(p.items) for p in plan[0] if p.real) for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    prompts = [len({i.sample_id for i in piece.items}) for piece in pieces if piece.real]
    assert prompts_read(groups, size, ranks=ranks, micro_batch=micro) == prompts
