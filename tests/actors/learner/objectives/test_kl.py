"""The token KL estimators: Schulman's formulas, and what their gradients are in expectation, by enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from actors.learner.objectives.grpo import grpo_loss, kl_estimate

LOGITS = torch.tensor([0.3, -0.2, 1.1, -1.5], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([1.0, 0.4, -0.3, 0.2], dtype=torch.float64), 0)


def expected_gradient(value) -> torch.Tensor:
    """Gradient of E_p[value(log p)] with p held fixed: what many on-policy samples' losses push, exactly."""
    logits = LOGITS.clone().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    (gradient,) = torch.autograd.grad((logp.detach().exp() * value(logp)).sum(), logits)
    return gradient


def gradient_of_kl(forward: bool) -> torch.Tensor:
    """Gradient of KL(ref || current), or of KL(current || ref), from torch.distributions."""
    logits = LOGITS.clone().requires_grad_()
    current, reference = (
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Categorical(logits=REFERENCE),
    )
    pair = (reference, current) if forward else (current, reference)
    (gradient,) = torch.autograd.grad(torch.distributions.kl_divergence(*pair), logits)
    return gradient


def test_values_are_schulmans_formulas() -> None:
    logp, ref = torch.tensor([[math.log(0.5), math.log(0.2)]]), torch.tensor([[math.log(0.25), math.log(0.4)]])
    delta = [-math.log(2.0), math.log(2.0)]
    by_hand = {
        "k1": [-d for d in delta],
        "k2": [d * d / 2 for d in delta],
        "k3": [0.5 - delta[0] - 1, 2.0 - delta[1] - 1],
    }
    for name, values in by_hand.items():
        torch.testing.assert_close(kl_estimate(logp, ref, name), torch.tensor([values]))
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(logp, ref, "closed")


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logp = torch.log_softmax(LOGITS, 0)
    exact = (logp.exp() * (logp - REFERENCE)).sum()
    means = {name: (logp.exp() * kl_estimate(logp, REFERENCE, name)).sum() for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert abs(means["k2"] - exact) > 0.01


def test_gradients_in_expectation_are_those_the_docstring_names() -> None:
    reverse, forward = gradient_of_kl(forward=False), gradient_of_kl(forward=True)
    for name, expected in (("k1", reverse), ("k2", reverse), ("k3", forward)):
        gradient = expected_gradient(lambda logp, name=name: kl_estimate(logp, REFERENCE, name))
        torch.testing.assert_close(gradient, expected, msg=name)
    assert (reverse - forward).abs().max() > 0.01  # the two can be told apart here
    bare = expected_gradient(lambda logp: logp - REFERENCE)
    torch.testing.assert_close(bare, torch.zeros_like(bare))  # why k1 does not keep its own gradient


def test_the_loss_moves_by_beta_times_the_estimate() -> None:
    logp, ref = torch.tensor([[-0.5, -1.0], [-0.2, -3.0]]), torch.tensor([[-0.9, -0.4], [-0.1, -2.0]])
    mask, options = torch.tensor([[True, True], [True, False]]), {"clip_low": 0.2, "clip_high": 0.2}
    for name in ("k1", "k2", "k3"):
        kl = kl_estimate(logp, ref, name)
        losses = [
            grpo_loss(logp, logp, torch.zeros(2), mask, **options, loss_norm="token", normaliser=3.0, kl=kl, beta=beta)
            for beta in (0.0, 0.5)
        ]
        assert float(losses[0][0]) == 0.0
        assert float(losses[1][0]) == pytest.approx(0.5 * float(kl[mask].mean()), rel=1e-6)
        assert losses[1][1].kl == pytest.approx(float(kl[mask].sum()), rel=1e-6)
