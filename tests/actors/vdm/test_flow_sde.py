"""The sigma grid, one SDE step by hand, and the window's movement.

The step against simulations, torch.distributions and the ODE: test_parity_sde.py."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from actors.records import SdeSpec
from actors.vdm import flow_sde
from actors.vdm.flow_sde import Transition, WindowSchedule
from cluster.errors import ConfigError

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


def test_cps_by_hand():
    """sigma .8 -> .6 at level 1/3: std = .6 sin 30° = .3; x0 = 2.8, x1 = 1.8; mean = .4 * 2.8 + sqrt(.27) * 1.8."""
    x, v = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    step = flow_sde.transition(x, v, torch.tensor([0.8]), torch.tensor([0.6]), torch.tensor(0.9), "cps", 1 / 3)
    assert step.std.item() == pytest.approx(0.3) and step.mean.item() == pytest.approx(0.4 * 2.8 + 0.27**0.5 * 1.8)


@pytest.mark.parametrize("schedule", ["flow", "wan", "dance", "cps"])
def test_level_0_is_the_ode_to_the_bit(point, schedule):
    x, v, sigma, following, second = point
    step = flow_sde.transition(x, v, sigma, following, second, schedule, 0.0)
    assert torch.equal(step.mean, flow_sde.ode_step(x, v, sigma, following)) and step.std.tolist() == [0.0] * 3


def test_log_density_by_hand():
    """Two values .3 and .1 off a mean, std .2: the mean of -.5 (z^2) - ln .2 - ln(2 pi)/2 with z = 1.5 and .5."""
    step = Transition(torch.tensor([[1.0, 2.0]]), torch.tensor([0.2]))
    found = flow_sde.step_logprob(torch.tensor([[1.3, 1.9]]), step)
    assert found.tolist() == pytest.approx([-(2.25 + 0.25) / 4 - math.log(0.2) - 0.5 * math.log(2 * math.pi)], rel=1e-5)
    kl = flow_sde.kl_gaussian(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.3, 1.9]]), torch.tensor([0.2]))
    assert kl.tolist() == pytest.approx([(0.09 + 0.01) / 2 / (2 * 0.04)], rel=1e-5)


def test_a_grid_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1 denoising step"):
        flow_sde.sigma_grid(0)


def test_shifted_sigmas_by_hand():
    assert flow_sde.shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


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


def test_each_prompt_has_a_window_of_its_own():
    """Of the run's seed, the step and the prompt alone, and spread over all places."""
    windows = WindowSchedule("random", first=2, last=9, size=3, every=2, seed=4, per="prompt")
    starts = {(step, f"s{i}"): windows.start_at(step, f"s{i}") for step in range(0, 40, 2) for i in range(30)}
    counts = [list(starts.values()).count(place) for place in range(2, 7)]
    assert sum(counts) == 600 and min(counts) > 80  # 120 are expected at each of five places
    assert len({starts[0, f"s{i}"] for i in range(30)}) == 5 == len({starts[step, "s0"] for step in range(0, 40, 2)})
    again = WindowSchedule("random", first=2, last=9, size=3, every=2, seed=4, per="prompt")
    assert {key: again.start_at(*key) for key in reversed(starts)} == starts
    assert again.start_at(1, "s0") == starts[0, "s0"]  # it moves every second step
    other = WindowSchedule("random", first=2, last=9, size=3, every=2, seed=5, per="prompt")
    assert {key: other.start_at(*key) for key in starts} != starts
    batch = WindowSchedule("random", first=2, last=9, size=3, seed=4)
    assert all(batch.start_at(step, "s0") == batch.start_at(step) for step in range(20)), "a batch's is no prompt's"
    with pytest.raises(ConfigError, match="schedule random, not fixed"):
        WindowSchedule("fixed", first=2, last=9, size=3, per="prompt")
    assert windows.reach == (2, 9) and WindowSchedule("fixed", first=2, last=9, size=3).reach == (2, 5)


@pytest.mark.parametrize("kind", ["fixed", "progressive", "random"])
def test_a_window_follows_from_the_steps_number_alone(kind):
    """So nothing has to be remembered: a resumed run asks for the step it is at."""
    asked = [WindowSchedule(kind, first=0, last=8, size=2, every=3, seed=9).start_at(step) for step in range(20)]
    schedule = WindowSchedule(kind, first=0, last=8, size=2, every=3, seed=9)
    assert [schedule.start_at(step) for step in reversed(range(20))] == asked[::-1]
    assert all(0 <= start <= 6 for start in asked)
    with pytest.raises(FrozenInstanceError):
        schedule.first = 1


# --- whose noise the rest can remove --------------------------------------------------------------------------------


def width(steps, shift, schedule, level, start, size, spread=1e-4, draws=2000):
    """Std of the final latents over the ODE's, for data of std ``spread`` about 0 and its exact velocity."""
    grid, generator = flow_sde.sigma_grid(steps, shift), torch.Generator().manual_seed(0)

    def velocity(x, sigma):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        return (x - (1 - sigma) * spread**2 / variance * x) / sigma

    first = torch.randn(1, draws, generator=generator)
    x = ode = first
    for i in range(steps):
        sigma, following = grid[i].expand(1), grid[i + 1].expand(1)
        ode = flow_sde.ode_step(ode, velocity(ode, grid[i]), sigma, following)
        if start <= i < start + size:
            step = flow_sde.transition(x, velocity(x, grid[i]), sigma, following, grid[1], schedule, level)
            x = flow_sde.draw(step, torch.randn(1, draws, generator=generator))
        else:
            x = flow_sde.ode_step(x, velocity(x, grid[i]), sigma, following)
    return float(x.std() / ode.std())


GRIDS = [(8, 3.0), (10, 1.0), (10, 3.0), (10, 5.0), (25, 3.0)]
LEVELS = [("flow", 0.7), ("flow", 0.35), ("wan", 1.0), ("dance", 0.3), ("cps", 0.5)]


@pytest.mark.parametrize(("schedule", "level"), LEVELS)
@pytest.mark.parametrize(("steps", "shift"), GRIDS)
def test_a_window_at_any_place_of_the_default_range_leaves_no_noise(steps, shift, schedule, level):
    may = flow_sde.removable_steps(steps, shift, schedule, level)
    assert may.start == 0 and len(may) >= steps - 3
    for start in {0, len(may) // 2, *may[-3:]}:
        surplus = flow_sde.surplus_noise(flow_sde.sigma_grid(steps, shift), schedule, level)[start].item()
        ratio = width(steps, shift, schedule, level, start, 1)
        assert ratio <= 2**0.5 * 1.02
        assert ratio == pytest.approx((1 + surplus**2) ** 0.5, rel=0.05)
    for start in {0, *range(len(may) - 3, len(may) - 1)}:
        assert width(steps, shift, schedule, level, start, 2) <= 1.5


@pytest.mark.parametrize(("schedule", "level"), [k for k in LEVELS if k[0] != "cps"])
@pytest.mark.parametrize(("steps", "shift"), GRIDS)
def test_the_first_step_beyond_the_default_range_leaves_noise(steps, shift, schedule, level):
    beyond = flow_sde.removable_steps(steps, shift, schedule, level).stop
    assert beyond <= steps - 2 and width(steps, shift, schedule, level, beyond, 1) > 2**0.5 * 0.99


def test_the_step_onto_the_grids_last_sigma_makes_grain():
    """The case of a report: latents of std .05 came out with std .24 where the window reached that step."""
    grain = {start: width(10, 3.0, "flow", 0.7, start, 1, spread=0.05) for start in range(9)}
    assert grain[8] > 10 and max(grain[start] for start in range(8)) < 1.3


def test_the_surplus_by_hand():
    """sigma .8 -> .6 at level .5: std^2 = .2, so .2 * .25 + (.2 / 1.6)^2 = .065625 = (.6 q)^2; see the step by hand."""
    grid = torch.tensor([1.0, 0.8, 0.6, 0.0])
    surplus = flow_sde.surplus_noise(grid, "flow", 0.5)
    assert surplus.shape == (2,) and surplus[1] == pytest.approx(0.065625**0.5 / 0.6, rel=1e-5)
    # sigma 1 -> .8 with .2 in the denominator: s^2 = 1.25, std^2 = .25; .25 * .2 + .125^2.
    assert surplus[0] == pytest.approx(0.065625**0.5 / 0.8, rel=1e-5)
    assert flow_sde.surplus_noise(grid, "cps", 1.0).tolist() == [0.0, 0.0]
    assert flow_sde.surplus_noise(grid, "wan", 0.0).tolist() == [0.0, 0.0]


def test_which_steps_may_be_stochastic():
    assert flow_sde.removable_steps(10, 3.0, "flow", 0.7) == range(8)  # 9 is the ODE's, 8 steps onto sigma .009
    assert flow_sde.removable_steps(10, 3.0, "cps", 1.0) == range(9)
    assert flow_sde.removable_steps(10, 3.0, "dance", 1e-6) == range(9)
    assert flow_sde.removable_steps(10, 3.0, "flow", 1.3) == range(2, 7)  # the longest run, where early steps drown too
    # A surplus of .997 and of 1.008 sigma', of .652, 1.002, .856 and 1.3: of two runs of one step the first.
    assert [flow_sde.removable_steps(4, 3.0, "flow", level) for level in (0.665, 0.67)] == [range(2), range(1)]
    assert flow_sde.removable_steps(6, 3.0, "flow", 1.03) == range(1)
    assert flow_sde.removable_steps(10, 3.0, "flow", 9.0) == flow_sde.removable_steps(1, 3.0, "flow", 0.7) == range(0)


def test_windows_that_cannot_be():
    with pytest.raises(ConfigError, match="cannot move within"):
        WindowSchedule("fixed", first=0, last=2, size=3)
    with pytest.raises(ConfigError, match="last step is always an ODE step"):
        flow_sde.check_window(SdeSpec("flow", 0.7, 2, 2), steps=4)
    with pytest.raises(ConfigError, match="the schedules are flow, wan, dance, cps"):
        flow_sde.check_window(SdeSpec("square", 0.7, 0, 1), steps=4)  # type: ignore[arg-type]
    flow_sde.check_window(SdeSpec("flow", 0.7, 1, 2), steps=4)


def test_windows_at_their_bounds():
    for kind in ("fixed", "progressive", "random"):
        assert WindowSchedule(kind, first=2, last=4, size=2).start_at(7) == 2  # one place alone
    for wrong in ({"first": -1, "last": 4, "size": 1}, {"first": 0, "last": 4, "size": 0}):
        with pytest.raises(ConfigError, match="cannot move within"):
            WindowSchedule("fixed", **wrong)
    with pytest.raises(ConfigError, match="every at least 1"):
        WindowSchedule("fixed", first=0, last=4, size=1, every=0)
    with pytest.raises(ConfigError, match="the schedules are fixed, progressive, random"):
        WindowSchedule("still", first=0, last=4, size=1)
    for start, size in ((-1, 2), (0, 0), (2, 2)):
        with pytest.raises(ConfigError, match="does not fit 4 denoising steps"):
            flow_sde.check_window(SdeSpec("flow", 0.7, start, size), steps=4)
    flow_sde.check_window(SdeSpec("flow", 0.7, 0, 3), steps=4)


@pytest.mark.parametrize("schedule", ["flow", "wan", "dance", "cps"])
def test_levels_at_their_bounds(schedule):
    """cps turns the noise by level * pi/2: beyond 1 its std would shrink again. The others have no upper bound."""
    for level in (0.0, 1.0):
        flow_sde.check_window(SdeSpec(schedule, level, 0, 1), steps=4)
    with pytest.raises(ConfigError, match="at least 0"):
        flow_sde.check_window(SdeSpec(schedule, -1e-6, 0, 1), steps=4)
    if schedule == "cps":
        with pytest.raises(ConfigError, match="at most 1"):
            flow_sde.check_window(SdeSpec(schedule, 1.0 + 1e-6, 0, 1), steps=4)
    else:
        flow_sde.check_window(SdeSpec(schedule, 1.5, 0, 1), steps=4)
