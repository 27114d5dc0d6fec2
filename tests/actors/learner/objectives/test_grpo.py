"""The loss against a hand calculation, against an independent implementation, and at its limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.learner.objectives.base import LossStats
from actors.learner.objectives.grpo import (
    bounded,
    grpo_loss,
    importance_weights,
    k3,
    kl_estimate,
    normaliser,
)
from pipeline.stages.advantages import group_advantages


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


# --- at the bounds --------------------------------------------------------------------------------------------------


def one_step_each(log_ratios: list[float], advantages: list[float], **more: Any) -> tuple[Tensor, Tensor, LossStats]:
    """Loss, gradient and statistics of trajectories of one step, whose log-ratio and advantage are given; clip .8 … 1.28."""
    logp = torch.tensor(log_ratios)[:, None].requires_grad_()
    old, mask = torch.zeros(len(log_ratios), 1), torch.ones(len(log_ratios), 1, dtype=torch.bool)
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "loss_norm": "token", "normaliser": 1.0} | more
    loss, stats = grpo_loss(logp, old, torch.tensor(advantages), mask, **options)
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad[:, 0], stats


def test_a_huge_log_ratio_is_bounded_and_counted() -> None:
    """float32's exp is infinite from 88.8 on: −2·∞ and 0·∞ stood here."""
    infinite = math.inf
    loss, gradient, stats = one_step_each([90.0, 90.0, 90.0, -90.0, infinite, 20.0], [1.0, -2.0, 0.0, 1.0, 0.0, 0.0])
    # A = 1: clipped at 1.28; A = −2: 2 e^20; A = 0: nothing; ρ = e^−20 with A = 1.
    assert float(loss) == pytest.approx(-1.28 + 2 * math.exp(20) - math.exp(-20), rel=1e-6)
    assert gradient.tolist() == [0.0] * 6  # clipped, cut, or without an advantage
    assert stats.bounded == 5 and stats.steps == 6  # 20 itself is within
    assert math.isinf(stats.ratio_max_dev)  # the true one is told
    assert stats.ratio == pytest.approx(5 * math.exp(20), rel=1e-6)


def test_within_the_bound_every_bit_is_that_of_plain_exp() -> None:
    g = torch.Generator().manual_seed(0)
    delta = torch.cat([(torch.rand(4000, generator=g) - 0.5) * 40, torch.tensor([-20.0, 20.0, 0.0])])
    ours, plain = (delta.clone().requires_grad_() for _ in range(2))
    bounded(ours).exp().sum().backward()
    plain.exp().sum().backward()
    assert torch.equal(bounded(delta), delta) and torch.equal(ours.grad, plain.grad)  # type: ignore[arg-type]
    a, b = (torch.zeros_like(delta).requires_grad_() for _ in range(2))
    value, expected = k3(a, delta), torch.expm1(delta - b) - (delta - b)
    value.sum().backward()
    expected.sum().backward()
    assert torch.equal(value, expected) and torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_policies_that_have_nothing_in_common_is_finite_and_pulls_back(estimator: str) -> None:
    """Δ = ref − current of ±90 nats, and current = −∞."""
    logp = torch.tensor([-0.1, -90.1], requires_grad=True)
    value = kl_estimate(logp, torch.tensor([-90.1, -0.1]), estimator)
    value.sum().backward()
    assert value.isfinite().all() and logp.grad is not None and logp.grad.isfinite().all()
    assert logp.grad[0] > 0 >= logp.grad[1]  # a step against it makes the first less likely, the second not
    if estimator == "k3":
        assert value.tolist() == pytest.approx([89.0, math.exp(20) - 21], rel=1e-6)
        assert k3(torch.tensor([-math.inf]), torch.tensor([-1.0])).isfinite().all()


def test_importance_weights_of_an_engine_far_away() -> None:
    mask = torch.tensor([[True, True, False]])
    old, engine = torch.tensor([[-1.0, -95.0, -1.0]]), torch.tensor([[-95.0, -1.0, -math.inf]])
    assert importance_weights(old, engine, mask, 2.0).tolist() == [[2.0, pytest.approx(math.exp(-20)), 1.0]]
    assert importance_weights(old, engine, mask, math.inf)[0, 0] == pytest.approx(math.exp(20))
    _, stats = grpo_loss(
        old.clone(),
        old,
        torch.tensor([0.0]),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        loss_norm="token",
        normaliser=1.0,
        rollout_logprobs=engine,
    )
    assert stats.bounded == 2 and stats.truncated == 1


def test_what_is_bounded_counts_steps_and_no_padding() -> None:
    """A step is counted once, however many of its three log-ratios are cut; padding is not."""
    logp = torch.tensor([[95.0, 0.0, 0.0, 95.0]])
    zero, mask = torch.zeros(1, 4), torch.tensor([[True, True, True, False]])
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "loss_norm": "token", "normaliser": 3.0}
    _, stats = grpo_loss(
        logp,
        zero,
        torch.zeros(1),
        mask,
        **options,
        kl_log_ratio=torch.tensor([[95.0, -95.0, 19.0, 95.0]]),
        rollout_logprobs=torch.tensor([[95.0, 0.0, 0.0, 95.0]]),
    )
    assert stats.bounded == 2
    assert grpo_loss(logp, zero, torch.zeros(1), mask, **options)[1].bounded == 1


def test_at_the_clip_bounds_and_without_an_advantage_nothing_is_clipped() -> None:
    inside = [math.log(0.8) + 1e-6, math.log(1.28) - 1e-6]
    outside = [math.log(0.8) - 1e-6, math.log(1.28) + 1e-6]
    for log_ratios, advantages, expected in (
        (inside, [-1.0, 1.0], (0, 0)),
        (outside, [-1.0, 1.0], (1, 1)),
        (outside, [0.0, 0.0], (0, 0)),  # without an advantage a step has nothing that could be clipped
        (outside, [1.0, -1.0], (0, 0)),  # the pessimistic side is kept: it has its gradient
    ):
        _, gradient, stats = one_step_each(log_ratios, advantages)
        assert (stats.clipped_low, stats.clipped_high) == expected and stats.clipped == sum(expected)
        if expected == (0, 0):
            torch.testing.assert_close(gradient, -torch.tensor(log_ratios).exp() * torch.tensor(advantages))


def test_a_ratio_of_exactly_the_bound_is_not_clipped() -> None:
    """rho = 2 and 1/2, which float32's exp gives exactly, at bounds of 1 and 1/2."""
    half, two = math.log(0.5), math.log(2.0)
    assert torch.tensor([half, two]).exp().tolist() == [0.5, 2.0]
    for clip, expected in ((0.0, 0.0), (1e-6, 1.0)):
        _, _, stats = one_step_each([half, two], [-1.0, 1.0], clip_low=0.5 - clip, clip_high=1.0 - clip)
        assert (stats.clipped_low, stats.clipped_high) == (expected, expected)


def test_no_gradient_goes_into_importance_weights() -> None:
    old = torch.tensor([[-1.0]], requires_grad=True)
    weights = importance_weights(old, torch.tensor([[-1.5]]), torch.tensor([[True]]), 9.0)
    assert not weights.requires_grad and float(weights) == pytest.approx(math.exp(0.5))


def test_statistics_leave_padding_out() -> None:
    logp, mask = torch.tensor([[0.1, -0.3, 9.0]]), torch.tensor([[True, True, False]])
    kl = torch.tensor([[0.5, 0.25, 7.0]], requires_grad=True)
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "loss_norm": "token", "normaliser": 1.0}
    loss, stats = grpo_loss(logp, torch.zeros(1, 3), torch.ones(1), mask, **options, kl=kl, beta=0.1)
    assert stats.steps == 2 and stats.kl == pytest.approx(0.75)
    assert stats.ratio == pytest.approx(math.exp(0.1) + math.exp(-0.3))
    assert stats.ratio_max_dev == pytest.approx(0.3)  # the largest of either sign
    loss.backward()
    assert kl.grad is not None and kl.grad.tolist() == [[pytest.approx(0.1), pytest.approx(0.1), 0.0]]


def test_what_divides_nothing_is_refused() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert [normaliser(mask, norm, 1) for norm in ("token", "sequence", "constant")] == [0.0, 0.0, 0.0]
    assert normaliser(~mask, "constant", 3) == 6.0
    for length in (0, -1):
        with pytest.raises(ValueError, match="constant_length >= 1"):
            normaliser(~mask, "constant", length)


def test_advantages_of_small_differences_are_not_nothing() -> None:
    """Only rewards that are equal are equal; eps bounds what a tiny spread can do."""
    (a, b), zero = group_advantages([[0.0, 2e-4], [0.5, 0.5]], "group", eps=1e-4)
    assert zero == 1 and a.tolist() == pytest.approx([-0.5, 0.5]) and not b.any()
    (a, _, c), zero = group_advantages([[0.0, 2e-4], [1e-4] * 2, [1e-4] * 3], "batch", eps=1e-4)
    std = math.sqrt(2 * 1e-8 / 7)
    assert zero == 2 and a.tolist() == pytest.approx([-1e-4 / (std + 1e-4), 1e-4 / (std + 1e-4)]) and len(c) == 3


def test_padding_above_the_cap_is_not_truncated() -> None:
    old, engine = torch.tensor([[-1.0, -1.0, 0.0, -1.0]]), torch.tensor([[-1.0, -3.0, -9.0, -1.0 - math.log(2.0)]])
    mask = torch.tensor([[True, True, False, False]])
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "loss_norm": "token", "normaliser": 2.0}
    for counts, expected in ((mask, 1), (torch.tensor([[True, False, False, True]]), 0), (~mask, 1)):
        _, stats = grpo_loss(
            old, old, torch.ones(1), counts, **options, rollout_logprobs=engine, importance_cap=2.0 + 1e-6
        )
        assert stats.truncated == expected


def test_a_trajectory_without_a_step_is_no_sequence() -> None:
    """A row whose mask is empty (padding of a rank) adds neither to the sum nor to the normaliser."""
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert normaliser(mask, "sequence") == 2 and normaliser(mask, "token") == 3
    assert normaliser(mask, "constant", 5) == 10
    logp, old = torch.full((3, 3), -1.0), torch.full((3, 3), -1.5)
    for norm in ("sequence", "token", "constant"):
        options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 9.0, "loss_norm": norm}
        whole, few = (
            grpo_loss(logp[r], old[r], torch.ones(3)[r], mask[r], **options, normaliser=normaliser(mask[r], norm, 5))[0]
            for r in (slice(0, 3), [0, 2])
        )
        torch.testing.assert_close(whole, few)
        assert math.isfinite(float(whole))


def test_a_cut_trajectory_is_divided_by_its_whole_length() -> None:
    """``lengths`` of 4 steps where the batch holds 2 of them: two halves are the whole."""
    g = torch.Generator().manual_seed(1)
    logp, old = torch.randn(2, 4, generator=g), torch.randn(2, 4, generator=g)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "loss_norm": "sequence", "normaliser": 2.0}
    whole, _ = grpo_loss(logp, old, torch.tensor([1.0, -1.0]), mask, **options)
    halves = [
        grpo_loss(logp[:, s], old[:, s], torch.tensor([1.0, -1.0]), mask[:, s], **options, lengths=mask.sum(-1))[0]
        for s in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole)
