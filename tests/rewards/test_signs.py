"""Signs of reward hacking, by hand and against NumPy."""

import numpy as np
import pytest

from rewards import signs
from rewards.errors import RewardError

X, Y = np.array([1.0, 0.0]), np.array([0.0, 2.0])


def moving(frames: int = 9, size: int = 16) -> np.ndarray:
    """A white square on grey that moves one pixel per frame."""
    clip = np.full((frames, size, size, 3), 60, np.uint8)
    for t in range(frames):
        clip[t, 4:9, t : t + 5] = 250
    return clip


def test_motion_by_hand() -> None:
    clip = np.zeros((3, 4, 4, 3), np.uint8)
    clip[1] = 51
    assert signs.motion(clip) == pytest.approx(0.2)  # |51/255| twice, over two differences
    assert signs.motion(clip[:1]) == 0.0
    assert signs.motion_ratio(clip, clip) == 1.0
    assert signs.motion_ratio(clip * 0, clip * 0) == 1.0, "a still answer to a still truth is right"


def test_flicker_is_no_motion() -> None:
    truth, rng = moving(), np.random.default_rng(0)
    flicker = rng.integers(-signs.NOISE // 2, signs.NOISE // 2 + 1, truth.shape)
    still = (np.repeat(truth[:1], 9, axis=0).astype(int) + flicker).astype(np.uint8)
    both = np.clip(truth.astype(int) + flicker, 0, 255).astype(np.uint8)
    assert np.abs(np.diff(still.astype(int), axis=0)).mean() > 2, "the whole picture flickers"
    assert signs.motion_ratio(still, truth) < 0.01
    assert signs.motion_ratio(both, truth) == pytest.approx(1.0, abs=0.05)


def test_colour_and_texture_have_known_values() -> None:
    truth = moving()
    red = truth.copy()
    red[..., 1:] = red[..., 1:] // 2
    assert signs.frame_diagnostics(red, truth)["saturation_shift"] == pytest.approx(0.5, abs=0.01)
    assert signs.sharpness(np.full((2, 8, 8, 3), 99, np.uint8)) == pytest.approx(0.0, abs=1e-12)
    dot = np.zeros((1, 5, 5, 3), np.uint8)
    dot[0, 2, 2] = 255  # of nine Laplacians one is −4 and four are 1, and their mean is 0
    assert signs.sharpness(dot) == pytest.approx((16 + 4) / 9, abs=1e-5)


def test_copying_is_measured_against_the_truth_s_own() -> None:
    assert signs.copying([X, X], [X, Y], X) == (pytest.approx(1.0), pytest.approx(0.5))
    assert signs.copying([X, Y], [X, X], 3 * X) == (
        pytest.approx(0.5),
        pytest.approx(-0.5),
    )  # farther away than the truth
    assert signs.copying([-X], [Y], X) == (pytest.approx(-1.0), pytest.approx(-1.0))


def test_correlations_equal_numpy_and_constants_have_none() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    found = signs.component_correlations({"a": a, "b": b, "c": np.full(50, 0.3), "d": -a})
    assert found["a", "b"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found["a", "d"] == pytest.approx(-1.0)
    assert not any("c" in pair for pair in found)


def test_a_correlation_never_leaves_its_range() -> None:
    """Rounding takes the quotient of two lines beyond 1 by 2e-16; what is logged stays within."""
    beyond = 0
    for seed in range(200):
        a = np.random.default_rng(seed).normal(size=5)
        b = -3.0 * a + 0.1
        x, y = a - a.mean(), b - b.mean()
        beyond += float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) < -1.0
        found = signs.component_correlations({"a": a, "b": b, "c": 2 * a})
        assert -1.0 <= found["a", "b"] < -0.999999 and 0.999999 < found["a", "c"] <= 1.0
    assert beyond > 0


def test_a_change_of_exactly_the_noise_is_none() -> None:
    clip = np.full((2, 4, 4, 3), 100, np.uint8)
    clip[1, 0, 0, 0] += signs.NOISE
    assert signs.motion(clip) == 0.0
    clip[1, 0, 0, 0] += 1
    assert signs.motion(clip) == pytest.approx((signs.NOISE + 1) / 255 / 48)


def test_still_pictures_are_alike_and_frozen_ones_are_near_none() -> None:
    still, truth = np.full((2, 4, 4, 3), 9, np.uint8), np.full((2, 4, 4, 3), 9, np.uint8)
    truth[1] += 51
    assert signs.motion_ratio(still, truth) == pytest.approx(signs.STILL / (0.2 + signs.STILL))
    assert signs.motion_ratio(truth, still) == pytest.approx((0.2 + signs.STILL) / signs.STILL)
    assert signs.motion(truth[:2]) == pytest.approx(0.2)  # two frames have one change


def test_sharpness_is_each_frames_own_and_needs_three_pixels() -> None:
    """Frames of different brightness are flat all the same: the variance is taken in a frame, not over the clip."""
    ramp = np.zeros((2, 3, 3, 3), np.uint8)
    ramp[0] += (np.arange(3, dtype=np.uint8) ** 2 * 20)[None, :, None]  # a parabola: one Laplacian, the same everywhere
    ramp[1] += 50
    assert signs.sharpness(ramp) == pytest.approx(0.0, abs=1e-9)
    for shape in ((1, 2, 9, 3), (1, 9, 2, 3)):
        with pytest.raises(RewardError, match="at least 3x3"):
            signs.sharpness(np.zeros(shape, np.uint8))
    found = signs.frame_diagnostics(moving() // 2, moving())
    assert found["sharpness_ratio"] == pytest.approx(0.25, abs=0.01)


def test_saturation_by_hand() -> None:
    def of(*rgb: int) -> float:
        return signs.saturation(np.full((1, 2, 2, 3), rgb, np.uint8))

    assert of(0, 0, 0) == 0.0 and of(255, 255, 255) == 0.0 and of(1, 0, 0) == 1.0
    assert of(200, 100, 150) == pytest.approx(0.5) and of(0, 0, 255) == 1.0
