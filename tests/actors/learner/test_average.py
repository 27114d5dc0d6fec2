"""The moving average by hand: its growing decay, its limit, and that applying it leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.learner.average import Average


def test_average_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([8.0]))
    average = Average([parameter], decay=0.15)
    steps = []
    for step, value in enumerate([18.0, 28.0, -2.0]):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(step)
        steps.append(average.values[0].item())
    # decays 1/10, then 2/11 and 3/12 cut to .15
    first = 0.1 * 8 + 0.9 * 18
    second = 0.15 * first + 0.85 * 28
    assert steps == pytest.approx([first, second, 0.15 * second + 0.85 * -2])


def test_applying_it_is_undone_bit_for_bit_even_after_an_error() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))]
    average = Average(parameters, decay=0.9)
    raw = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        parameters[0].add_(1e-7).mul_(3)
    raw[0] = parameters[0].detach().clone()
    average.update(20)
    mean = [v.clone() for v in average.values]
    with pytest.raises(RuntimeError, match="disk"), average.applied():
        assert all(torch.equal(p, m) for p, m in zip(parameters, mean))
        assert not torch.equal(parameters[0], raw[0])
        raise RuntimeError("disk")
    assert all(torch.equal(p, r) for p, r in zip(parameters, raw))
    assert all(torch.equal(v, m) for v, m in zip(average.values, mean))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay="):
        Average([nn.Parameter(torch.zeros(1))], decay)
