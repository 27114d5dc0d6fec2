"""Motion, structure and alignment: limit cases by hand, and the source libraries where there are any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data.toy import make_sample
from rewards.alignment import aligned_similarity, warped_similarity
from rewards.errors import RewardError
from rewards.motion import cosines, displacements, energies, motion_agreement
from rewards.structure import first_frame, ssim

pytestmark = pytest.mark.slow


def moving(step: tuple[int, int], start: tuple[int, int] = (24, 24), size: int = 8, frames: int = 6) -> np.ndarray:
    """A textured square on grey that goes ``step`` (down, right) pixels a frame."""
    rng = np.random.default_rng(0)
    square = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    clip = np.full((frames, 64, 64, 3), 90, np.uint8)
    for t in range(frames):
        y, x = start[0] + t * step[0], start[1] + t * step[1]
        clip[t, y : y + size, x : x + size] = square
    return clip


@pytest.mark.parametrize("step", [(3, 0), (-3, 0), (0, 3), (2, -2)])
def test_a_square_goes_where_it_goes(step: tuple[int, int]) -> None:
    clip = moving(step).astype(np.float64)
    energy, moves = energies(clip), displacements(clip)
    assert energy.shape == (5, 8, 8) and moves.shape == (5, 8, 8, 2)
    busiest = np.unravel_index(int(energy[0].argmax()), (8, 8))
    assert energy[0].sum() > 0 and busiest[0] in range(2, 5) and busiest[1] in range(2, 5)
    assert tuple(moves[0][3, 3]) == step, "the cell that holds the square in the first frame"


def test_the_truth_agrees_with_itself_and_a_frozen_clip_with_nothing() -> None:
    for index in range(6):
        truth = make_sample(index, "test").target_frames
        frozen = np.repeat(truth[:1], len(truth), axis=0)
        assert motion_agreement(truth, truth) == pytest.approx(1.0)
        assert motion_agreement(frozen, truth) == 0.0
        assert motion_agreement(truth[::-1], truth) < 0.5, "the same places, the other way round"
    assert motion_agreement(frozen, frozen) == 1.0
    flicker = frozen + np.random.default_rng(0).integers(0, 8, frozen.shape, dtype=np.uint8) % 8
    assert motion_agreement(np.minimum(flicker, 255).astype(np.uint8), truth) < 0.05, "what a decoder does is no motion"


def test_the_right_way_is_worth_more_than_the_wrong_one_and_elsewhere_nothing() -> None:
    truth = moving((0, 3))
    ways = {way: motion_agreement(moving(step), truth) for way, step in {"back": (0, -3), "down": (3, 0)}.items()}
    assert ways["back"] < 0.3 and ways["down"] < 0.5
    assert motion_agreement(moving((0, 3), start=(0, 0)), truth) == 0.0
    slower = motion_agreement(moving((0, 2)), truth)
    assert ways["back"] < slower < 1.0
    assert motion_agreement(np.repeat(truth, 2, axis=0), truth) == pytest.approx(1.0), "frame counts may differ"


def test_cosines_of_displacements_by_hand() -> None:
    first = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    second = np.array([[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert cosines(first, second) == pytest.approx([1.0, -1.0, 1.0, 0.0, 0.8])


def test_motion_needs_a_picture() -> None:
    with pytest.raises(RewardError, match="at least 8x8 pixels, got 4x4"):
        motion_agreement(np.zeros((3, 4, 4, 3), np.uint8), np.zeros((3, 4, 4, 3), np.uint8))


def test_ssim_equals_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    rng = np.random.default_rng(0)
    sample = make_sample(0, "test")
    pictures = [sample.target_frames[0], sample.target_frames[-1], sample.input_frames[-1]]
    pictures += [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), np.zeros((32, 32, 3), np.uint8)]
    for a in pictures:
        for b in pictures:
            tensors = [torch.from_numpy(p.copy()).permute(2, 0, 1)[None].double() / 255 for p in (a, b)]
            expected = structural_similarity_index_measure(*tensors, data_range=1.0, sigma=1.5, kernel_size=11)
            assert ssim(a, b) == pytest.approx(float(expected), abs=1e-6)


def test_the_first_frame_goes_on_where_the_input_ends() -> None:
    sample = make_sample(0, "test")
    going_on = np.concatenate([sample.input_frames[-1:], sample.target_frames[1:]])
    assert first_frame(going_on, sample.input_frames[-1]) == pytest.approx(1.0)
    assert first_frame(255 - going_on, sample.input_frames[-1]) < 0.5
    with pytest.raises(RewardError, match="pictures of one size"):
        first_frame(going_on[:, :16], sample.input_frames[-1])
    with pytest.raises(RewardError, match="at least 11x11"):
        ssim(going_on[0, :8, :8], going_on[0, :8, :8])


def test_a_clip_that_does_the_right_thing_later_is_not_wrong() -> None:
    """Three moments a, b, c; the late clip waits in a. By hand: aligned (1 + 0 + 0)/3, warped all ones."""
    a, b, c = np.eye(3)
    truth, late = np.stack([a, b, c, c]), np.stack([a, a, b, c])
    assert aligned_similarity(truth, truth) == warped_similarity(truth, truth) == 1.0
    assert aligned_similarity(late, truth) == pytest.approx(2 / 4)
    assert warped_similarity(late, truth) == pytest.approx(1.0)
    assert warped_similarity(truth[::-1], truth) < 0.5, "the order still counts"
    assert warped_similarity(np.stack([a, c]), truth) == pytest.approx(3 / 4), "b has no like; four pairs on the path"


def test_warping_is_the_best_of_all_paths() -> None:
    """Against every monotone path of small clips, enumerated."""
    rng = np.random.default_rng(1)
    clip, truth = rng.normal(size=(4, 5)), rng.normal(size=(3, 5))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (clip, truth)]
    cosine = unit[0] @ unit[1].T

    def paths(i: int, j: int) -> list[list[tuple[int, int]]]:
        if (i, j) == (0, 0):
            return [[(0, 0)]]
        before = [p for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(p) >= 0]
        return [[*path, (i, j)] for place in before for path in paths(*place)]

    best = min(paths(3, 2), key=lambda path: sum(1 - cosine[place] for place in path))
    assert warped_similarity(clip, truth) == pytest.approx(float(np.mean([cosine[place] for place in best])))
