"""How a batch is cut: groups stay whole, ranks run equally often, nothing is lost or seen twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from actors.learner.batches import plan_batch, prompts_read, split_groups
from actors.records import VideoQuestion, VlmExperience


def items(*sizes: int) -> list[VlmExperience]:
    """Groups a, b, c … of these sizes, one behind the other."""
    frames, ids, logprobs = np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int32), np.zeros(1, np.float32)
    return [
        VlmExperience(chr(97 + g), i, VideoQuestion("?", frames, 8.0), ids, logprobs, 0.0)
        for g, size in enumerate(sizes)
        for i in range(size)
    ]


def names(found: list) -> str:
    return "".join(item.sample_id for item in found)


def test_groups_are_never_cut_and_come_in_the_order_of_their_first_member() -> None:
    mixed = items(2, 3, 1)
    shuffled = [mixed[i] for i in (2, 0, 5, 3, 1, 4)]  # b a c b a b
    assert [names(part) for part in split_groups(shuffled, 2)] == ["bbbaa", "c"]
    assert [names(part) for part in split_groups(shuffled, 9)] == ["bbb", "aa", "c"]  # no more parts than groups
    assert [names(part) for part in split_groups(shuffled, 1)] == ["bbbaac"]
    assert split_groups([], 3) == []


def test_a_plan_by_hand() -> None:
    """Two groups of 3 in one step, two ranks, at most 2 at a time: 3 items a rank, in pieces of 2 and 1."""
    plans = plan_batch(items(3, 3), ranks=2, micro_batch=2, updates=1)
    assert [[[names(list(m.items)) for m in step] for step in plan] for plan in plans] == [
        [["aa", "a"]],
        [["bb", "b"]],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 100])
@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (1,), (3, 1, 2), (8, 1)])
def test_every_plan_is_even_and_whole(sizes: tuple[int, ...], ranks: int, micro_batch: int, updates: int) -> None:
    found = items(*sizes)
    plans = plan_batch(found, ranks=ranks, micro_batch=micro_batch, updates=updates)
    assert len(plans) == ranks and {len(plan) for plan in plans} == {min(updates, len(sizes))}
    for step in range(min(updates, len(sizes))):
        pieces = [plan[step] for plan in plans]
        assert len({len(piece) for piece in pieces}) == 1  # collectives match
        real = [[m for m in piece if m.real] for piece in pieces]
        loads = [sum(len(m.items) for m in piece) for piece in real]
        assert max(loads) - min(loads) <= 1
        assert all(1 <= len(m.items) <= micro_batch for piece in pieces for m in piece)
        fewest = -(-max(loads) // micro_batch)
        assert len(pieces[0]) == fewest
        padding = [m for piece in pieces for m in piece if not m.real]
        assert all(len(m.items) == 1 for m in padding)
    seen = [m.items for plan in plans for step in plan for m in step if m.real]
    assert sorted(map(id, itertools.chain(*seen))) == sorted(map(id, found))


def test_padding_is_a_copy_of_the_steps_own_first_item_and_weighs_nothing() -> None:
    plans = plan_batch(items(1, 1), ranks=3, micro_batch=4, updates=2)
    steps = [[plan[step][0] for plan in plans] for step in (0, 1)]
    for name, micros in zip("ab", steps):
        assert [names(list(m.items)) for m in micros] == [name] * 3 and sum(m.real for m in micros) == 1


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one experience"):
        plan_batch([], ranks=1, micro_batch=1, updates=1)


@pytest.mark.parametrize(
    ("groups", "size", "ranks", "micro_batch"), [(4, 4, 2, 2), (3, 5, 2, 4), (8, 8, 2, 32), (1, 3, 2, 8)]
)
def test_prompts_read_is_what_the_plan_reads(groups: int, size: int, ranks: int, micro_batch: int) -> None:
    plans = plan_batch(items(*[size] * groups), ranks=ranks, micro_batch=micro_batch, updates=1)
    expected = [len({i.sample_id for i in m.items}) for plan in plans for m in plan[0] if m.real]
    assert prompts_read(groups, size, ranks=ranks, micro_batch=micro_batch) == expected
