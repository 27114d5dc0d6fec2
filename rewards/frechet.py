"""Fréchet distance of two sets of video features, float64, named after the features' extractor.

FVD (arXiv 1812.01717) is this distance over I3D features; over any other features it is another number, so its name
says which, and the counts stand beside it: the estimate is biased upwards for small N, and only equal N compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewards.errors import RewardError
from rewards.similarity import normalised

I3D = "i3d"


@dataclass(frozen=True)
class FrechetDistance:
    """A distance ≥ 0, what it was measured with, and on how many clips of ``dim`` features each."""

    value: float
    extractor: str
    n: int
    n_truth: int
    dim: int

    @property
    def name(self) -> str:
        """``FVD`` for I3D features, otherwise ``FVD[extractor]``."""
        return fvd_name(self.extractor)

    @property
    def well_posed(self) -> bool:
        """Whether both covariances can have full rank (more clips than features)."""
        return min(self.n, self.n_truth) > self.dim


def fvd_name(extractor: str) -> str:
    """Return the metric's name: only I3D features make it plain FVD."""
    return "FVD" if extractor == I3D else f"FVD[{extractor}]"


def gaussian_frechet(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    """Return |μa − μb|² + tr(A + B − 2 (A B)^½) of two Gaussians with means (D,) and covariances (D, D).

    tr (A B)^½ is computed as Σ √λ of the symmetric A^½ B A^½, which has the same eigenvalues and stays real where a
    matrix square root of the product A B would turn complex by rounding (singular covariances, N < D).
    """
    mu_a, mu_b = np.asarray(mean_a, dtype=np.float64), np.asarray(mean_b, dtype=np.float64)
    a, b = np.atleast_2d(np.asarray(cov_a, dtype=np.float64)), np.atleast_2d(np.asarray(cov_b, dtype=np.float64))
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    inner = root @ ((b + b.T) / 2) @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0, None)).sum()
    return max(0.0, float(((mu_a - mu_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2.0 * cross))


def frechet_distance(generated: ArrayLike, truth: ArrayLike, extractor: str) -> FrechetDistance:
    """Return the distance of the features (N, D) and (M, D), one row per clip, unbiased covariances.

    Raises RewardError for fewer than 2 clips on a side, unequal D or non-finite features.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise RewardError(
            f"a Fréchet distance needs two sets (N, D), (M, D) of at least 2 clips each, got {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise RewardError("a Fréchet distance needs finite features")
    value = gaussian_frechet(x.mean(axis=0), np.cov(x, rowvar=False), y.mean(axis=0), np.cov(y, rowvar=False))
    return FrechetDistance(value, extractor, len(x), len(y), x.shape[1])


def repeated_frechet(generated: ArrayLike, truth: ArrayLike, times: ArrayLike) -> NDArray[np.float64]:
    """Return the distance (R,) of pairs of clips, (N, D) and (N, D), when pair i is there ``times`` (R, N) [r, i] times.

    The same number as :func:`frechet_distance` of the repeated rows, made for a bootstrap: with covariances X'X and Y'Y
    of centred rows, tr (X'X Y'Y)^½ is the sum of the singular values of X Y', which triangular factors of X and Y keep;
    they are taken where there are more clips than features.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    counts = np.asarray(times, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 2 or counts.shape[1:] != x.shape[:1]:
        raise RewardError(f"repeated pairs need (N, D), (N, D) and (R, N), got {x.shape}, {y.shape}, {counts.shape}")
    at_once = max(1, 2_000_000 // x.size)
    return np.concatenate([_repeated(x, y, counts[i : i + at_once]) for i in range(0, len(counts), at_once)])


def _repeated(x: NDArray[np.float64], y: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    total = times.sum(axis=1)
    shift, spread, factors = np.zeros((len(times), x.shape[1])), np.zeros(len(times)), []
    for rows, sign in ((x, 1.0), (y, -1.0)):
        mean = times @ rows / total[:, None]
        centred = np.sqrt(times / (total[:, None] - 1.0))[..., None] * (rows - mean[:, None])
        shift += sign * mean
        spread += (centred**2).sum(axis=(1, 2))
        factors.append(np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred)
    cross = np.linalg.svd(factors[0] @ factors[1].swapaxes(1, 2), compute_uv=False).sum(axis=1)
    return np.maximum(0.0, (shift**2).sum(axis=1) + spread - 2.0 * cross)


def clip_frames_feature(frames: ArrayLike, dim: int) -> NDArray[np.float32]:
    """Return one clip's feature (dim,) from the CLIP features (T, D) of its frames: appearance and change, projected.

    Unit-length frame features; their mean over frames (appearance) and the mean |difference| and signed difference of
    the last and first frame (change) are concatenated to (3 D,) and projected by a fixed random orthonormal matrix,
    so that a covariance can be estimated from tens of clips. The same (D, dim) always gives the same projection.
    """
    features = normalised(frames, "frame features")
    if features.ndim != 2:
        raise RewardError(f"a clip's feature needs frame features (T, D), got {features.shape}")
    steps = np.abs(np.diff(features, axis=0)).mean(axis=0) if len(features) > 1 else np.zeros(features.shape[1])
    whole = np.concatenate([features.mean(axis=0), steps, features[-1] - features[0]])
    if dim > len(whole):
        raise RewardError(f"dim={dim} exceeds the {len(whole)} numbers there are")
    return (whole @ _projection(len(whole), dim)).astype(np.float32)


def _projection(rows: int, columns: int) -> NDArray[np.float64]:
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((rows, columns)))
    return q * np.sign(np.diag(r))  # the sign of a column is LAPACK's choice otherwise
