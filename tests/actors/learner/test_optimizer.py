"""One optimizer step: applied, or skipped and counted; and a checkpoint of it goes on exactly. Plain modules, no ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from actors.learner.checkpoint import save_tensors
from actors.learner.optimizer import Optimizer
from actors.learner.settings import OptimSection
from cluster.errors import TrainingError

OPTIM = OptimSection(lr=0.1, warmup_steps=2, max_grad_norm=1.0, max_skipped_steps=1, ema=0.9)


def made(seed: int = 0) -> Optimizer:
    torch.manual_seed(seed)
    return Optimizer(nn.Linear(3, 2), OPTIM, 10, "a learner")


def learn(optimizer: Optimizer, steps: int, first: int = 0) -> list[torch.Tensor]:
    """Take ``steps`` steps whose gradients are those of fixed inputs, and return the parameters."""
    for step in range(first, first + steps):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = optimizer.module(inputs).square().mean()
        loss.backward()
        optimizer.step(float(loss.detach()))
    return [parameter.detach().clone() for parameter in optimizer.parameters]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_counted_and_bounded(broken: str) -> None:
    optimizer = made()
    before = learn(optimizer, 1)
    for time in (1, 2):
        for parameter in optimizer.parameters:
            parameter.grad = torch.full_like(parameter, math.inf if broken == "gradient" else 1.0)
        loss = math.nan if broken == "loss" else 1.0
        if time == 2:
            with pytest.raises(
                TrainingError, match=r"a learner: 2 optimizer steps.*max_skipped_steps=1; lower the.*0\.1"
            ):
                optimizer.step(loss)
        else:
            assert not optimizer.step(loss).applied
    assert all(torch.equal(p, was) for p, was in zip(optimizer.parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in optimizer.parameters)
    assert (optimizer.steps, optimizer.skipped, optimizer.applied) == (3, 2, 1)


def test_the_rate_is_of_the_step_and_the_norm_of_what_was_not_yet_clipped() -> None:
    optimizer = made()
    for expected in (0.05, 0.1, 0.1):
        for parameter in optimizer.parameters:
            parameter.grad = torch.full_like(parameter, 3.0)
        stepped = optimizer.step(0.0)
        assert stepped.lr == pytest.approx(expected)
        assert stepped.grad_norm == pytest.approx(3.0 * 8**0.5)  # 2 × 3 weights and 2 biases


def test_a_restored_one_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = made(), made(), made(seed=1)
    expected = learn(whole, 5)
    learn(first, 2)
    save_tensors(first.tensors() | {"more": {"x": torch.arange(3.0)}}, str(tmp_path))
    read = second.restore(str(tmp_path), {"more": {"x": torch.zeros(3)}})
    second.steps, second.skipped = first.steps, first.skipped
    assert torch.equal(read["more"]["x"], torch.arange(3.0))
    assert all(torch.equal(a, b) for a, b in zip(learn(second, 3, first=2), expected, strict=True))
    assert whole.average is not None and second.average is not None
    assert all(torch.equal(a, b) for a, b in zip(second.average.values, whole.average.values, strict=True))
