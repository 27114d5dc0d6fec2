"""The loss against a hand calculation, against an independent implementation, and at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actors.learner.advantages import group_advantages
from actors.learner.grpo import grpo_loss, importance_weights, k3, normaliser


def test_advantages_by_hand() -> None:
    (a, b), zero = group_advantages([[1.0, 2.0, 3.0], [0.0, 4.0]], "group", eps=1e-4)
    std = math.sqrt(2 / 3)
    np.testing.assert_allclose(a, [-1 / (std + 1e-4), 0, 1 / (std + 1e-4)])
    np.testing.assert_allclose(b, [-2 / 2.0001, 2 / 2.0001])
    assert zero == 0
    (a, b), _ = group_advantages([[1.0, 2.0, 3.0], [0.0, 4.0]], "none")
    np.testing.assert_allclose(np.concatenate([a, b]), [-1, 0, 1, -2, 2])
    pooled = np.std([1.0, 2.0, 3.0, 0.0, 4.0])
    (a, b), _ = group_advantages([[1.0, 2.0, 3.0], [0.0, 4.0]], "batch")
    np.testing.assert_allclose(np.concatenate([a, b]), np.array([-1, 0, 1, -2, 2]) / (pooled + 1e-4))


def test_advantages_at_their_limits() -> None:
    (equal, single, other), zero = group_advantages([[0.1] * 7, [5.0], [0.0, 1.0]], "batch")
    assert zero == 2 and not equal.any() and not single.any()  # exactly 0: no gradient from rounding
    assert other[1] > 0
    assert group_advantages([], "batch") == ([], 0)
    shifted, _ = group_advantages([[1e6, 1e6 + 1]])
    np.testing.assert_allclose(shifted[0], group_advantages([[0.0, 1.0]])[0][0], rtol=1e-6)
    with pytest.raises(ValueError, match="not finite"):
        group_advantages([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="no rewards"):
        group_advantages([[]])
    with pytest.raises(ValueError, match="std_norm"):
        group_advantages([[1.0]], "stdev")


def test_loss_by_hand() -> None:
    """2 trajectories of 3 and 2 steps; ratios 1, 1.5, 0.5 with A=1 and 1.5, 0.5 with A=−2; ε = 0.2."""
    ratios = torch.tensor([[1.0, 1.5, 0.5], [1.5, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.full((2, 3), -1.0)
    logprobs = (old + ratios.log()).requires_grad_()
    advantages = torch.tensor([1.0, -2.0])
    # A=1: min(1,1)=1, min(1.5,1.2)=1.2, min(.5,.8)=.5;  A=−2: min(−3,−2.4)=−3, min(−1,−1.6)=−1.6
    expected = {"token": (-2.7 + 4.6) / 5, "sequence": (-2.7 / 3 + 4.6 / 2) / 2, "constant": (-2.7 + 4.6) / (2 * 10)}
    for norm, value in expected.items():
        count = normaliser(mask, norm, constant_length=10)
        loss, stats = grpo_loss(
            logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.2, loss_norm=norm, normaliser=count
        )
        assert float(loss) == pytest.approx(value, rel=1e-6)
    assert (stats.steps, stats.clipped_high, stats.clipped_low) == (5, 1, 1)
    assert stats.ratio_max_dev == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    # Clipped steps and padding have no gradient; the others −ρA/N.
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, 0, -0.5], [3.0, 0, 0]]) / 20)


def independent(logp, old, adv, mask, low, high, norm, kl_ref, beta, length):
    """The same loss step by step in Python scalars, as the papers write it."""
    per_sequence, tokens = [], 0
    for i in range(logp.shape[0]):
        terms = []
        for t in range(logp.shape[1]):
            if not mask[i, t]:
                continue
            rho = torch.exp(logp[i, t] - old[i, t])
            surrogate = torch.min(rho * adv[i], torch.clip(rho, 1 - low, 1 + high) * adv[i])
            delta = kl_ref[i, t] - logp[i, t]
            terms.append(-(surrogate - beta * (torch.exp(delta) - delta - 1)))
        tokens += len(terms)
        per_sequence.append(terms)
    if norm == "token":
        return sum(x for s in per_sequence for x in s) / tokens
    if norm == "sequence":
        return sum(sum(s) / len(s) for s in per_sequence) / len(per_sequence)
    return sum(sum(s) for s in per_sequence) / (len(per_sequence) * length)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("high", [0.2, 0.5])
def test_loss_and_gradient_equal_an_independent_implementation(norm: str, beta: float, high: float) -> None:
    g = torch.Generator().manual_seed(0)
    logp = (-torch.rand(5, 7, generator=g, dtype=torch.float64) * 3).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(5, 7, generator=g, dtype=torch.float64)
    ref = logp.detach() + 0.4 * torch.randn(5, 7, generator=g, dtype=torch.float64)
    adv = torch.randn(5, generator=g, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([7, 1, 4, 6, 2])[:, None]
    expected = independent(logp, old, adv, mask, 0.2, high, norm, ref, beta, 9)
    (gradient,) = torch.autograd.grad(expected, logp)
    # Cut into micro-batches that share the global normaliser: their losses add up.
    total = normaliser(mask, norm, 9)
    parts = [
        grpo_loss(
            logp[s],
            old[s],
            adv[s],
            mask[s],
            clip_low=0.2,
            clip_high=high,
            loss_norm=norm,
            normaliser=total,
            kl=k3(logp[s], ref[s]) if beta else None,
            beta=beta,
        )[0]
        for s in (slice(0, 2), slice(2, 5))
    ]
    loss = parts[0] + parts[1]
    (ours,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, gradient)


def test_importance_weights_clip_higher_and_kl_by_hand() -> None:
    """Three tokens with A = 1, two with A = −2; clip 0.8 … 1.28; weights cut at C = 3; β = 0.1."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logp = torch.tensor([[0.50, 0.60, 0.20], [0.60, 0.10, 0.9]]).log().requires_grad_()
    old = torch.tensor([[0.50, 0.40, 0.40], [0.40, 0.20, 0.1]]).log()  # ρ = 1, 1.5, 0.5; 1.5, 0.5
    engine = torch.tensor([[0.25, 0.40, 0.50], [0.50, 0.05, 0.1]]).log()  # w = 2, 1, 0.8; 0.8, min(4, 3)
    ref = torch.tensor([[0.50, 0.30, 0.20], [0.30, 0.20, 0.1]]).log()  # π_ref/π = 1, 0.5, 1; 0.5, 2
    torch.testing.assert_close(
        importance_weights(old, engine, mask, 3.0), torch.tensor([[2.0, 1.0, 0.8], [0.8, 3.0, 1.0]])
    )
    loss, stats = grpo_loss(
        logp,
        old,
        torch.tensor([1.0, -2.0]),
        mask,
        clip_low=0.2,
        clip_high=0.28,
        loss_norm="token",
        normaliser=5.0,
        kl=k3(logp, ref),
        beta=0.1,
        rollout_logprobs=engine,
        importance_cap=3.0,
    )
    # min(ρA, clip(ρ)A) = 1, 1.28, 0.5; −3, −1.6.  Weighted: 2, 1.28, 0.4; −2.4, −4.8.
    # k3 = 0, 0.5 − ln 0.5 − 1, 0; 0.5 − ln 0.5 − 1, 2 − ln 2 − 1 = 0, 0.1931, 0; 0.1931, 0.3069, not weighted.
    expected = (-2 - 1.28 - 0.4 + 2.4 + 4.8 + 0.1 * (0.1931 + 0.1931 + 0.3069)) / 5
    assert float(loss.detach()) == pytest.approx(expected, abs=2e-5)
    assert (stats.clipped_high, stats.clipped_low, stats.truncated) == (1, 1, 1)
    loss.backward()
    # −wρA where not clipped, plus β(1 − π_ref/π).
    gradient = torch.tensor([[-2.0, 0.1 * 0.5, -0.4], [2.4 + 0.1 * 0.5, -0.1 * 1, 0.0]]) / 5
    torch.testing.assert_close(logp.grad, gradient)


def test_padding_of_any_value_changes_nothing() -> None:
    logp = torch.tensor([[-1.0, float("-inf")]], requires_grad=True)
    old, mask = torch.tensor([[-1.1, float("nan")]]), torch.tensor([[True, False]])
    loss, _ = grpo_loss(
        logp, old, torch.tensor([1.0]), mask, clip_low=0.2, clip_high=0.2, loss_norm="token", normaliser=1.0
    )
    loss.backward()
    assert math.isfinite(float(loss)) and torch.isfinite(logp.grad).all() and logp.grad[0, 1] == 0


def test_contradictions_are_named() -> None:
    x, mask, a = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1)
    options = {"clip_low": 0.2, "clip_high": 0.2}
    with pytest.raises(ValueError, match="needs the KL"):
        grpo_loss(x, x, a, mask, **options, loss_norm="token", normaliser=1.0, beta=0.1)
    with pytest.raises(ValueError, match="normaliser"):
        grpo_loss(x, x, a, mask, **options, loss_norm="token", normaliser=0.0)
    with pytest.raises(ValueError, match="constant_length"):
        normaliser(mask, "constant")
    with pytest.raises(ValueError, match="loss_norm"):
        normaliser(mask, "mean")
