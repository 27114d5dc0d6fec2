"""Similarities and the Fréchet distance, against hand calculations (references: ``test_parity``)."""

import numpy as np
import pytest

from rewards.errors import RewardError
from rewards.frechet import I3D, clip_frames_feature, frechet_distance, fvd_name, gaussian_frechet, repeated_frechet
from rewards.similarity import clip_score, clip_t, clip_v, resample_frames

X, Y = np.array([1.0, 0.0]), np.array([0.0, 2.0])


def test_resampling_keeps_both_ends_and_is_uniform() -> None:
    assert resample_frames(np.arange(9), 5).tolist() == [0, 2, 4, 6, 8]
    assert resample_frames(np.arange(3), 5).tolist() == [0, 1, 1, 2, 2]
    assert resample_frames(np.arange(9), 1).tolist() == [4]
    assert resample_frames(np.arange(4), 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(RewardError):
        resample_frames(np.arange(0), 4)


def test_clip_v_compares_frames_at_equal_times() -> None:
    assert clip_v([X, Y], [X, Y]) == pytest.approx(1.0)
    assert clip_v([Y, X], [X, Y]) == pytest.approx(0.0), "the same frames in the wrong order are not the same video"
    assert clip_v([X, X, Y, Y], [X, Y]) == pytest.approx(1.0), "another frame rate is the same video"
    assert clip_v([X, X], [X, X + Y / 2]) == pytest.approx((1 + np.sqrt(0.5)) / 2)


def test_clip_t_and_clip_score() -> None:
    assert clip_t([X, Y], 3 * X) == pytest.approx(0.5)
    assert clip_t([X, X], -X) == pytest.approx(-1.0)
    assert clip_score([X, X], -X) == 0.0
    assert clip_score([X, Y], X) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]), np.full((2, 2), np.nan), np.zeros((0, 2))]
)
def test_features_without_a_direction_are_an_error_not_a_zero(bad: np.ndarray) -> None:
    with pytest.raises(RewardError):
        clip_v(bad, [X, Y])
    with pytest.raises(RewardError):
        clip_t([X, Y], bad)


def test_frechet_by_hand() -> None:
    # Two one-dimensional Gaussians: (μ1−μ2)² + (σ1−σ2)².
    assert gaussian_frechet([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1)
    # Commuting covariances: Σ (√a − √b)².
    assert gaussian_frechet([0, 0], np.diag([1, 4]), [0, 0], np.diag([9, 4])) == pytest.approx(4.0)
    x = np.random.default_rng(0).normal(size=(10, 32))  # fewer clips than features: singular covariances
    same = frechet_distance(x, x, "test")
    assert same.value == pytest.approx(0.0, abs=1e-6) and not same.well_posed


@pytest.mark.parametrize(("n", "dim"), [(40, 5), (12, 30), (3, 3)])
def test_a_distance_of_repeated_clips_is_that_of_the_repeated_rows(n: int, dim: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(5.0, 1.0, size=(n, dim)), rng.normal(5.2, 2.0, size=(n, dim)) @ rng.normal(size=(dim, dim))
    times = np.stack([np.ones(n, int), *(np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(6))])
    expected = [frechet_distance(x.repeat(t, axis=0), y.repeat(t, axis=0), "test").value for t in times]
    assert repeated_frechet(x, y, times) == pytest.approx(expected, rel=1e-6)
    assert repeated_frechet(x, x, times) == pytest.approx(0.0, abs=1e-9)


def test_rounding_never_makes_a_distance_negative() -> None:
    for seed in range(60):
        x = np.random.default_rng(seed).normal(size=(3 + seed % 7, 6))
        assert frechet_distance(x, x, "x").value >= 0.0
        assert repeated_frechet(x, x, np.ones((1, len(x))))[0] >= 0.0


def test_a_distance_is_well_posed_with_more_clips_than_features() -> None:
    """n clips about their own mean span n - 1 dimensions, so n = D leaves a singular covariance."""
    rng = np.random.default_rng(0)
    features = {n: rng.normal(size=(n, 4)) for n in (4, 5, 9)}
    assert np.linalg.matrix_rank(np.cov(features[4], rowvar=False)) == 3
    for n, m, expected in ((4, 9, False), (9, 4, False), (5, 9, True), (9, 5, True), (4, 4, False)):
        found = frechet_distance(features[n], features[m], "x")
        assert (found.n, found.n_truth, found.dim, found.well_posed) == (n, m, 4, expected)


def test_only_i3d_features_are_called_fvd() -> None:
    assert fvd_name(I3D) == "FVD"
    assert frechet_distance(np.eye(4), np.eye(4), "tiny-clip-frames-16").name == "FVD[tiny-clip-frames-16]"
    with pytest.raises(RewardError, match="at least 2"):
        frechet_distance(np.ones((1, 3)), np.ones((4, 3)), "x")


def test_the_clip_feature_sees_motion() -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(9, 8))
    still = np.repeat(frames.mean(axis=0, keepdims=True), 9, axis=0)
    a, b = clip_frames_feature(frames, 6), clip_frames_feature(still, 6)
    assert a.shape == (6,) and a.dtype == np.float32
    assert np.abs(a - b).max() > 0.05
    assert np.array_equal(a, clip_frames_feature(frames * 7.0, 6)) or np.allclose(
        a, clip_frames_feature(frames * 7.0, 6)
    )


def test_the_clip_feature_by_hand() -> None:
    """Appearance is the mean of unit frames, change the mean |step| and the last minus the first, in that order."""
    frames = np.array([[3.0, 0.0], [0.0, 5.0], [0.0, -1.0]])
    whole = np.array([1 / 3, 0.0, 1 / 2, 3 / 2, -1.0, -1.0])  # mean; (1 + 0, 1 + 2) / 2; (0, -1) - (1, 0)
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))
    np.testing.assert_allclose(clip_frames_feature(frames, 6), whole @ (q * np.sign(np.diag(r))), atol=1e-6)
    assert np.linalg.norm(clip_frames_feature(frames, 6)) == pytest.approx(np.linalg.norm(whole))
    one = np.concatenate([[0.6, 0.8], np.zeros(4)])
    np.testing.assert_allclose(
        clip_frames_feature([[3.0, 4.0]], 6), one @ (q * np.sign(np.diag(r))), atol=1e-6
    )  # a single frame does not change
    two = np.concatenate([[0.5, 0.5], [1.0, 1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(
        clip_frames_feature([[1.0, 0.0], [0.0, 1.0]], 6), two @ (q * np.sign(np.diag(r))), atol=1e-6
    )
    with pytest.raises(RewardError, match="dim=7 exceeds the 6 numbers"):
        clip_frames_feature(frames, 7)
    with pytest.raises(RewardError, match=r"\(T, D\)"):
        clip_frames_feature([1.0, 2.0], 2)


def test_frechet_needs_finite_features_of_two_sets_alike() -> None:
    good, bad = np.eye(4), np.eye(4)
    bad[1, 1] = np.inf
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(RewardError, match="finite"):
            frechet_distance(*pair, "x")
    for x, y in ((good, good[:, :3]), (good[0], good), (good, good[:1])):
        with pytest.raises(RewardError, match="two sets"):
            frechet_distance(x, y, "x")
    assert frechet_distance(good[:2], good[:2], "x").value == pytest.approx(0.0, abs=1e-12)  # two clips are enough


def test_resampling_half_way_rounds_up() -> None:
    assert resample_frames(np.arange(4), 3).tolist() == [0, 2, 3]  # 1.5 is 2
    assert resample_frames(np.arange(6), 3).tolist() == [0, 3, 5]  # 2.5 is 3, where rounding to even gives 2
    assert resample_frames(np.arange(5), 1).tolist() == [2] and resample_frames(np.arange(1), 3).tolist() == [0, 0, 0]
    with pytest.raises(RewardError, match="cannot take 0 frames"):
        resample_frames(np.arange(4), 0)
