"""The sigma grid, one SDE step by hand, and the window's movement.

The step against simulations, torch.distributions and the ODE: test_parity_sde.py."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from actors.records import SdeSpec
from actors.vdm import flow_sde
from actors.vdm.flow_sde import Transition, WindowSchedule
from cluster.errors import CheckpointError, ConfigError

SHAPE = (3, 4, 2, 3, 3)


@pytest.fixture
def point():
    """x, v and a step per row: the first from pure noise, the others in the middle."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    return x, v, torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.9, 0.65, 0.1]), torch.tensor(0.9)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_grid_is_the_stock_schedulers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = flow_sde.sigma_grid(steps, shift)
    assert torch.equal(grid, scheduler.sigmas)
    assert torch.equal(grid[:-1] * flow_sde.NUM_TRAIN_TIMESTEPS, scheduler.timesteps)
    assert grid[0] == 1 and grid[-1] == 0


def test_flow_schedule_by_hand():
    """sigma .8 -> .6, level .5: s = .5 sqrt(.8/.2) = 1, dt = -.2, drift = v + (x + .2 v) / 1.6."""
    x, v = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    sigmas = torch.tensor([0.8]), torch.tensor([0.6]), torch.tensor(0.9)
    step = flow_sde.transition(x, v, *sigmas, "flow", 0.5)
    assert step.std.item() == pytest.approx(0.2**0.5, rel=1e-5)
    assert step.mean.item() == pytest.approx(2.0 - 0.2 * (-1.0 + 1.8 / 1.6), rel=1e-5)


def test_noise_scales_by_hand():
    sigma, second = torch.tensor([1.0, 0.5]), torch.tensor(0.9)
    flow = flow_sde.noise_scale(sigma, second, "flow", 0.7)
    assert flow.tolist() == pytest.approx([0.7 * 10**0.5, 0.7], rel=1e-5)  # at sigma 1 the denominator is 1 - second
    assert flow_sde.noise_scale(sigma, second, "wan", 0.6).tolist() == pytest.approx([0.6, 0.3])
    assert flow_sde.noise_scale(sigma, second, "dance", 0.3).tolist() == pytest.approx([0.3, 0.3])


def test_half_precision_input_is_computed_in_float32(point):
    x, v, sigma, following, second = point
    low = flow_sde.transition(x.bfloat16(), v.bfloat16(), sigma, following, second, "flow", 0.7)
    high = flow_sde.transition(x.bfloat16().float(), v.bfloat16().float(), sigma, following, second, "flow", 0.7)
    assert low.mean.dtype == torch.float32 and torch.equal(low.mean, high.mean)
    assert flow_sde.step_logprob(x.bfloat16(), Transition(low.mean, low.std)).dtype == torch.float32


def test_window_kinds():
    fixed = WindowSchedule("fixed", first=1, last=6, size=2)
    assert [fixed.start_at(step) for step in range(4)] == [1, 1, 1, 1]
    moving = WindowSchedule("progressive", first=1, last=5, size=2, every=2)
    assert [moving.start_at(step) for step in range(8)] == [1, 1, 2, 2, 3, 3, 1, 1]
    jumping = WindowSchedule("random", first=2, last=9, size=3, seed=4)
    starts = [jumping.start_at(step) for step in range(200)]
    assert set(starts) == {2, 3, 4, 5, 6}
    assert starts == [WindowSchedule("random", first=2, last=9, size=3, seed=4).start_at(step) for step in range(200)]
    assert starts != [WindowSchedule("random", first=2, last=9, size=3, seed=5).start_at(step) for step in range(200)]


@pytest.mark.parametrize("kind", ["fixed", "progressive", "random"])
def test_window_resumes_where_it_stopped(kind):
    whole = WindowSchedule(kind, first=0, last=8, size=2, every=3, seed=9)
    expected = []
    for _ in range(20):
        expected.append(whole.start)
        whole.advance()
    first = WindowSchedule(kind, first=0, last=8, size=2, every=3, seed=9)
    seen = []
    for _ in range(7):
        seen.append(first.start)
        first.advance()
    second = WindowSchedule(kind, first=0, last=8, size=2, every=3, seed=9)
    second.restore(json.loads(json.dumps(first.state())))
    for _ in range(13):
        seen.append(second.start)
        second.advance()
    assert seen == expected
    with pytest.raises(CheckpointError, match="not the configured one"):
        WindowSchedule(kind, first=0, last=8, size=3, every=3, seed=9).restore(first.state())


def test_windows_that_cannot_be():
    with pytest.raises(ConfigError, match="cannot move within"):
        WindowSchedule("fixed", first=0, last=2, size=3)
    with pytest.raises(ConfigError, match="last step is always an ODE step"):
        flow_sde.check_window(SdeSpec("flow", 0.7, 2, 2), steps=4)
    with pytest.raises(ConfigError, match="the schedules are flow, wan, dance, cps"):
        flow_sde.check_window(SdeSpec("square", 0.7, 0, 1), steps=4)  # type: ignore[arg-type]
    flow_sde.check_window(SdeSpec("flow", 0.7, 1, 2), steps=4)
