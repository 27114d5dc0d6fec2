"""Trajectories as a batch: windows of several lengths and places, and their parts. No model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.records import SdeSpec, Trajectory, VdmExperience, VideoQuestion, VlmExperience
from actors.vdm.text_encoder import Captions
from actors.vdm.trajectories import Condition, Encoded, collate, experience, window_parts

GRID = np.array([1.0, 0.9, 0.7, 0.4, 0.1, 0.0], np.float32)
SHAPE = (2, 1, 2, 2)
NOTHING = Condition(Captions(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)), None, None, torch.ones(1))
CPU = torch.device("cpu")


def item(
    start: int, size: int, *, index: int = 0, level: float = 0.7, schedule: str = "flow", scale: int = 10
) -> VdmExperience:
    """A trajectory whose state number j is ``scale * index + j`` everywhere."""
    states = np.stack([np.full(SHAPE, scale * index + j, np.float32) for j in range(size + 1)])
    spec = SdeSpec(schedule, level, start, size)  # type: ignore[arg-type]
    path = Trajectory(states, GRID + np.float32(index), np.zeros(size, np.float32), spec, 1.0)
    return VdmExperience("s", index, "c", np.zeros((0, 8, 8, 3), np.uint8), path, 0.5)


def values(tensor: torch.Tensor) -> list:
    return tensor.flatten(2)[..., 0].tolist()


def test_windows_of_several_lengths_and_places_by_hand() -> None:
    batch = collate([item(1, 3), item(3, 1, index=1)], NOTHING, CPU)
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert values(batch.before) == [[0.0, 10.0], [1.0, 10.0], [2.0, 10.0]]  # the short one repeats its last step
    assert values(batch.after) == [[1.0, 11.0], [2.0, 11.0], [3.0, 11.0]]
    expected = [
        [[0.9, 1.4], [0.7, 1.1]],
        [[0.7, 1.4], [0.4, 1.1]],
        [[0.4, 1.4], [0.1, 1.1]],
    ]  # (step, now and next, item)
    torch.testing.assert_close(batch.sigmas, torch.tensor(expected))
    torch.testing.assert_close(batch.second, torch.tensor([0.9, 1.9]))
    assert (batch.schedule, batch.level) == ("flow", 0.7)
    assert batch.before.is_contiguous() and batch.before.dtype == batch.sigmas.dtype == torch.float32


def test_parts_are_the_whole_window_in_order() -> None:
    batch = collate([item(0, 4), item(1, 2, index=1)], NOTHING, CPU)
    for steps in (1, 2, 3, 4, 9):
        parts = window_parts(batch, steps)
        assert [len(part.before) for _, part in parts] == [min(steps, 4 - k) for k in range(0, 4, steps)]
        for name, dim in (("before", 0), ("after", 0), ("sigmas", 0), ("mask", 1)):
            whole = torch.cat([getattr(part, name) for _, part in parts], dim=dim)
            assert torch.equal(whole, getattr(batch, name))
        for cut, part in parts:
            assert torch.equal(part.mask, batch.mask[:, cut])
            assert part.second is batch.second and part.condition is batch.condition


@pytest.mark.parametrize("other", [{"level": 0.5}, {"schedule": "wan"}])
def test_what_cannot_share_a_batch_is_named(other: dict) -> None:
    with pytest.raises(ValueError, match=r"s\[3\]: .* must agree"):
        collate([item(0, 2), item(0, 2, index=3, **other)], NOTHING, CPU)
    small = item(0, 2, index=3)
    object.__setattr__(small.trajectory, "latents", small.trajectory.latents[..., :1])
    with pytest.raises(ValueError, match="must agree"):
        collate([item(0, 2), small], NOTHING, CPU)


def test_another_policys_experience_is_refused() -> None:
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    text = VlmExperience("s", 0, VideoQuestion("?", frames, 8.0), np.zeros(1, np.int32), np.zeros(1, np.float32), 0.0)
    with pytest.raises(TypeError, match="reads VdmExperience, got VlmExperience"):
        experience(text)
    assert experience(item(0, 1)).sample_id == "s"


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("references", [False, True])
def test_what_a_trajectory_was_conditioned_on_travels_unchanged(guided: bool, references: bool) -> None:
    g = torch.Generator().manual_seed(0)
    sent = Encoded(
        torch.randn(3, 4, generator=g),
        torch.randn(2, 4, generator=g) if guided else None,
        torch.randn(2, 1, 2, 2, generator=g) if references else None,
        max_tokens=7,
        image=torch.randn(3, 5, generator=g) if references else None,
    )
    record = sent.record()
    for array in (record.text, record.negative, record.references, record.image):
        if array is not None:
            array.flags.writeable = False  # as Ray hands them out
    received = Encoded.received(record, CPU)
    assert received.max_tokens == 7
    for name in ("text", "negative", "references", "image"):
        before, after = getattr(sent, name), getattr(received, name)
        assert (before is None and after is None) or torch.equal(before, after)
