"""Parity ladder of one stochastic step: against the SDE simulated finely, ``torch.distributions``, and the ODE.

The references know the data's distribution, so velocity and score are closed forms, and they use the score where
``flow_sde`` uses the velocity: dx = (v − s²/2 · ∇log p) dt + s dw, dt < 0. Whatever ``transition`` gets wrong about
that identity, about a factor of the noise or about time's direction shows. fp32 against float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from actors.records import NoiseSchedule, RenderRequest, SdeSpec, VdmExperience
from actors.vdm import flow_sde
from actors.vdm.flow_sde import Transition
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample_latents

LEVELS: dict[NoiseSchedule, float] = {"flow": 0.7, "wan": 0.9, "dance": 0.3, "cps": 0.5}
SCHEDULES = get_args(NoiseSchedule)
SDES = ("flow", "wan", "dance")  # cps is no SDE with a fixed s(sigma): see the tests that name it
WEIGHTS, MEANS, SPREAD = np.array([0.3, 0.7]), np.array([-1.5, 0.8]), 0.4  # the data: a mixture of two Gaussians


# --- the reference: a distribution whose flow is known -----------------------------------------------------------------


def variance(sigma: Any) -> Any:
    """Of one component of x_sigma = (1 − sigma) x0 + sigma eps."""
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def velocity_and_score(x: np.ndarray, sigma: float, means: np.ndarray = MEANS) -> tuple[np.ndarray, np.ndarray]:
    """E[eps − x0 | x] and the gradient of log p_sigma at x, float64."""
    var, away = variance(sigma), x[..., None] - (1 - sigma) * means
    weights = WEIGHTS * np.exp(-(away**2) / (2 * var))
    weights /= weights.sum(-1, keepdims=True)
    v = (weights * (-means + (sigma - (1 - sigma) * SPREAD**2) / var * away)).sum(-1)
    return v, (weights * -away / var).sum(-1)


def scale_of(schedule: str, level: float, sigma: float, second: float = math.nan) -> float:
    """s(sigma) of the papers; ``flow`` has none at sigma 1 and takes the grid's second sigma in its denominator."""
    if schedule == "flow":
        return level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else second)))
    return {"wan": level * sigma, "dance": level}[schedule]


def distance_to_marginal(x: np.ndarray, sigma: float) -> float:
    """Kolmogorov–Smirnov distance of samples to the exact p_sigma."""
    x = np.sort(x)
    exact = (WEIGHTS * norm.cdf(x[:, None], (1 - sigma) * MEANS, np.sqrt(variance(sigma)))).sum(-1)
    steps = np.arange(len(x) + 1) / len(x)
    return float(max(np.abs(exact - steps[:-1]).max(), np.abs(exact - steps[1:]).max()))


def tensors(*values: Any) -> list[Tensor]:
    return [torch.as_tensor(np.asarray(value), dtype=torch.float32) for value in values]


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SDES)
def test_one_step_has_the_mean_and_variance_of_a_fine_simulation(schedule: NoiseSchedule) -> None:
    """100,000 Euler–Maruyama paths of 8 small steps from each of eight points, against one step's Gaussian."""
    rng, particles, substeps, length = np.random.default_rng(0), 100_000, 8, 0.01
    level = {"flow": 0.7, "wan": 1.5, "dance": 1.2}[schedule]
    start = np.array([-3.0, -1.4, 1.2, 2.5])
    for sigma in (0.85, 0.6):
        x, dt = np.repeat(start[:, None], particles, 1), -length / substeps
        for k in range(substeps):
            time = sigma + k * dt
            v, score = velocity_and_score(x, time)
            s = scale_of(schedule, level, time)
            x += (v - s**2 / 2 * score) * dt + s * math.sqrt(-dt) * rng.normal(size=x.shape)
        v, score = velocity_and_score(start, sigma)
        given = tensors(start, v, np.full(4, sigma), np.full(4, sigma - length), 0.9)
        step = flow_sde.transition(*given, schedule, level)  # type: ignore[call-arg]
        error = 5 * x.std(1) / math.sqrt(particles) + 10 * length**2
        assert (np.abs(step.mean.numpy() - x.mean(1)) < error).all()
        assert np.allclose(step.std.numpy(), x.std(1), rtol=0.04)
        # The error bars would show the noise's drift missing: the ODE's step ends elsewhere.
        assert (np.abs(flow_sde.ode_step(*given[:4]).numpy() - x.mean(1)) > 2 * error).sum() >= 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_equals_the_formula_of_the_score_in_float64(schedule: NoiseSchedule, seed: int) -> None:
    """Random states and velocities: mean and std of ``transition`` against the papers' formulas written with the score."""
    for shape in ((1, 1), (3, 4, 2, 3, 3), (5, 16, 1, 2, 2)):
        x, v, sigma, following, second = random_point(shape, seed)
        step = flow_sde.transition(x, v, sigma, following, second, schedule, LEVELS[schedule])
        for row in range(shape[0]):
            mean, std = written_out(  # type: ignore[call-arg]
                *(t[row].double() for t in (x, v, sigma, following)), float(second), schedule, LEVELS[schedule]
            )
            assert (step.mean[row] - mean).abs().max() <= 1e-5 and abs(float(step.std[row]) - std) <= 1e-6


def random_point(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States, velocities, and a step each; the first row steps from pure noise."""
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(shape, generator=generator) for _ in range(2))
    times = torch.rand(2, shape[0], generator=generator) * 0.9 + 0.05
    sigma, following = times.max(0).values, times.min(0).values - 0.01
    sigma[0] = 1.0
    return x, v, sigma, following, torch.tensor(0.97)


def written_out(
    x: Tensor, v: Tensor, sigma: Tensor, following: Tensor, second: float, schedule: str, level: float
) -> tuple[Tensor, float]:
    """Mean and std of one row's step in float64 (Flow-GRPO, DanceGRPO; CPS, arXiv 2509.05952)."""
    if schedule == "cps":
        std = float(following) * math.sin(level * math.pi / 2)
        data, noise = x - sigma * v, x + (1 - sigma) * v
        return (1 - following) * data + math.sqrt(float(following) ** 2 - std**2) * noise, std
    s = scale_of(schedule, level, float(sigma), second)
    score = -(x + (1 - sigma) * v) / sigma
    dt = following - sigma
    return x + dt * (v - s**2 / 2 * score), s * math.sqrt(-float(dt))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_draws_have_the_mean_and_variance_of_the_formula(schedule: NoiseSchedule) -> None:
    shape = (3, 4, 2, 3, 3)
    step = flow_sde.transition(*random_point(shape, 0), schedule, LEVELS[schedule])
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([flow_sde.draw(step, torch.randn(shape, generator=generator)) for _ in range(4000)])
    spread = step.std.view(-1, 1, 1, 1, 1).expand(shape)
    assert ((draws.mean(0) - step.mean).abs() < 5 * spread / 4000**0.5).all()
    assert torch.allclose(draws.std(0) / spread, torch.ones(shape), atol=0.06)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_level_zero_is_exactly_the_ode_step(schedule: NoiseSchedule) -> None:
    for seed, shape in enumerate(((1, 1), (3, 4, 2, 3, 3), (5, 16, 1, 2, 2))):
        x, v, sigma, following, second = random_point(shape, seed)
        step = flow_sde.transition(x, v, sigma, following, second, schedule, 0.0)
        rows = (-1, *[1] * (len(shape) - 1))
        assert torch.equal(step.mean, x + (following - sigma).view(rows) * v)
        assert torch.equal(flow_sde.draw(step, torch.randn(shape)), step.mean)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_small_levels_approach_the_ode_step(schedule: NoiseSchedule) -> None:
    x, v, sigma, following, second = random_point((3, 4, 2, 3, 3), 0)
    step = flow_sde.transition(x, v, sigma, following, second, schedule, 1e-3)
    assert torch.allclose(step.mean, flow_sde.ode_step(x, v, sigma, following), atol=1e-4)
    assert (step.std < 7e-3).all() and (step.std > 0).all()


# --- marginals: noise must not change what is sampled -------------------------------------------------------------------


def final_variance_error(schedule: NoiseSchedule, level: float, steps: int, first: float = 0.95) -> float:
    """How far the chain of ``transition`` ends from the exact variance at sigma .05, with Gaussian data.

    The velocity is affine then, and so is each step: two probes give its coefficients, and mean and variance are
    carried through the chain exactly, without sampling noise. The mean is asserted here.
    """
    grid = np.linspace(first, 0.05, steps + 1)
    mean = 0.8
    probes = []
    for x in (0.0, 1.0):
        v = np.array([velocity_and_score(np.array(x), sigma, np.full(2, mean))[0] for sigma in grid[:-1]])
        states, velocities, sigmas, following, second = tensors(np.full(steps, x), v, grid[:-1], grid[1:], grid[1])
        step = flow_sde.transition(states, velocities, sigmas, following, second, schedule, level)
        probes.append(step.mean.double().numpy())
    centre, spread = (1 - first) * mean, variance(first)
    for a, b, std in zip(probes[1] - probes[0], probes[0], step.std.double().numpy()):
        centre, spread = a * centre + b, a**2 * spread + std**2
    assert centre == pytest.approx(0.95 * mean, abs=1e-3)
    return spread - variance(0.05)


@pytest.mark.parametrize(
    ("schedule", "level"), [("flow", 0.0), ("flow", 0.7), ("wan", 0.9), ("dance", 0.3), ("dance", 1.0)]
)
def test_marginals_are_the_odes_as_the_step_goes_to_zero(schedule: NoiseSchedule, level: float) -> None:
    """Halving the step halves the error of the final variance, towards zero, as for the ODE (level 0)."""
    errors = [final_variance_error(schedule, level, steps) for steps in (128, 256, 512)]
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3
    assert abs(errors[2]) < 0.01 * variance(0.05)


def test_cps_has_the_marginals_when_its_noise_shrinks_with_the_step() -> None:
    """cps replaces a fixed share of the noise in every step, whatever its length. With the share going as the square root
    of the step it is an SDE, and its error vanishes; with a fixed share and a model that predicts the mean of the noise it
    does not: more steps then take variance away. So its level belongs to a number of steps."""
    errors = [final_variance_error("cps", 2 * steps**-0.5, steps) for steps in (128, 256, 512)]
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3
    fixed = [final_variance_error("cps", 0.5, steps) for steps in (128, 256, 512)]
    assert all(error < -0.1 * variance(0.05) for error in fixed) and fixed[0] / fixed[2] < 1.3


def test_cps_keeps_the_marginal_exactly_when_the_model_knows_the_noise() -> None:
    """With the true eps − x0 (as for one training clip), one step of any length ends in the marginal at sigma'."""
    generator = torch.Generator().manual_seed(2)
    for level, sigma, following in ((0.6, 0.8, 0.5), (1.0, 0.95, 0.1), (0.2, 0.5, 0.45)):
        clean, noise, fresh = (torch.randn(1, 200_000, generator=generator) for _ in range(3))
        x, v = (1 - sigma) * clean + sigma * noise, noise - clean
        step = flow_sde.transition(x, v, *tensors([sigma], [following], 0.9), "cps", level)  # type: ignore[call-arg]
        rest = flow_sde.draw(step, fresh) - (1 - following) * clean
        assert rest.mean().item() == pytest.approx(0, abs=5e-3)
        assert rest.std().item() == pytest.approx(following, rel=1e-2)
        assert np.corrcoef(rest[0].numpy(), clean[0].numpy())[0, 1] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES])
def test_samples_of_two_modes_have_the_marginals_of_the_ode(schedule: NoiseSchedule | None) -> None:
    """20,000 paths through ``transition`` and ``draw`` on data of two modes, against the exact distribution."""
    rng, paths, steps = np.random.default_rng(3), 20_000, 250
    grid = np.linspace(0.95, 0.05, steps + 1)
    x = (1 - grid[0]) * rng.choice(MEANS, paths, p=WEIGHTS) + np.sqrt(variance(grid[0])) * rng.normal(size=paths)
    (state,) = tensors(x[None])
    assert distance_to_marginal(state[0].numpy(), grid[0]) < 0.015
    level = {"cps": 2 * steps**-0.5, None: 0.0}.get(schedule, LEVELS.get(schedule or "flow", 0.0))
    noise = torch.Generator().manual_seed(4)
    for sigma, following in itertools.pairwise(grid):
        v, _ = velocity_and_score(state.double().numpy(), sigma)
        velocity, start, end, second = tensors(v, [sigma], [following], grid[1])
        step = flow_sde.transition(state, velocity, start, end, second, schedule or "flow", level)
        state = flow_sde.draw(step, torch.randn(state.shape, generator=noise))
    assert distance_to_marginal(state[0].numpy(), grid[-1]) < 0.02
    assert distance_to_marginal(state[0].numpy() * 1.1, grid[-1]) > 0.03  # what a spread wrong by a tenth would show
    moved = np.corrcoef(state[0].numpy(), x)[0, 1]
    assert moved > 0.9 if schedule is None else moved < 0.9  # the SDE forgets where it started; the ODE does not


# --- densities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logprob_is_the_mean_of_torch_distributions(schedule: NoiseSchedule, seed: int) -> None:
    for shape in ((1, 1), (3, 4, 2, 3, 3), (5, 16, 1, 2, 2)):
        step = flow_sde.transition(*random_point(shape, seed), schedule, LEVELS[schedule])
        after = flow_sde.draw(step, torch.randn(shape, generator=torch.Generator().manual_seed(seed + 10)))
        std = step.std.view(-1, *[1] * (len(shape) - 1))
        expected = Normal(step.mean.double(), std.double()).log_prob(after.double()).flatten(1).mean(1)
        assert (flow_sde.step_logprob(after, step) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_kl_is_the_mean_of_torch_distributions(schedule: NoiseSchedule, seed: int) -> None:
    for shape in ((1, 1), (3, 4, 2, 3, 3), (5, 16, 1, 2, 2)):
        x, v, *times = random_point(shape, seed)
        other = v + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 20))
        one, two = (flow_sde.transition(x, u, *times, schedule, LEVELS[schedule]) for u in (v, other))  # type: ignore[call-arg]
        std = one.std.view(-1, *[1] * (len(shape) - 1))
        expected = kl_divergence(Normal(one.mean, std), Normal(two.mean, std)).flatten(1).mean(1)
        value = flow_sde.kl_gaussian(one.mean, two.mean, one.std)
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7) and (value > 0).all()
        assert torch.equal(flow_sde.kl_gaussian(one.mean, one.mean, one.std), torch.zeros(shape[0]))


def test_logprob_and_kl_against_numbers_worked_out_by_hand() -> None:
    """N(1, .5²) at 2 and 1: −2 − log .5 − ½ log 2π and −log .5 − ½ log 2π, averaged. Means 1 and 1.5 apart by .5: ½."""
    step = Transition(torch.tensor([[1.0, 1.0]]), torch.tensor([0.5]))
    expected = -1 + math.log(2) - 0.5 * math.log(2 * math.pi)
    assert flow_sde.step_logprob(torch.tensor([[2.0, 1.0]]), step).item() == pytest.approx(expected, abs=1e-6)
    assert flow_sde.kl_gaussian(step.mean, step.mean + 0.5, step.std).item() == pytest.approx(0.5)


# --- the policy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampler_and_learner_logprobs_are_those_of_the_stock_transformer(
    policy: VdmPolicy, tiny: Any, make_request: Callable[..., RenderRequest], schedule: NoiseSchedule, guidance: float
) -> None:
    """A sampled path scored by diffusers' own transformer and prompt encoding, the written formula and Normal."""
    sde, captions = SdeSpec(schedule, LEVELS[schedule], 0, 3), ["the red circle rises", "blue"]
    requests = [
        make_request(i, references=0, caption=caption, guidance=guidance, sde=sde, steps=5)
        for i, caption in enumerate(captions)
    ]
    _, paths = sample_latents(policy, requests, (16, 3, 4, 4))
    pipe = WanPipeline.from_pretrained(tiny)
    text, negative = pipe.encode_prompt(captions, do_classifier_free_guidance=guidance > 1, max_sequence_length=16)
    scored = torch.zeros(2, 3)
    for row, path in enumerate(paths):
        assert path is not None
        latents, sigmas = torch.from_numpy(path.latents), torch.from_numpy(path.sigmas)
        for k in range(3):
            given = {"hidden_states": latents[k : k + 1], "timestep": sigmas[k : k + 1] * 1000}
            with torch.no_grad():
                v = pipe.transformer(**given, encoder_hidden_states=text[row : row + 1]).sample[0]
                if guidance > 1:
                    base = pipe.transformer(**given, encoder_hidden_states=negative[row : row + 1]).sample[0]
                    v = base + guidance * (v - base)
            mean, std = written_out(  # type: ignore[call-arg]
                latents[k].double(), v.double(), *sigmas[k : k + 2].double(), float(sigmas[1]), schedule, sde.level
            )
            scored[row, k] = Normal(mean, std).log_prob(latents[k + 1].double()).mean()
    sampled = torch.tensor(np.stack([path.logprobs for path in paths if path is not None]))
    assert (sampled - scored).abs().max() <= 1e-5
    items = [
        VdmExperience("s", i, caption, requests[i].reference_frames, path, 1.0)
        for i, (caption, path) in enumerate(zip(captions, paths))
        if path is not None
    ]
    with torch.no_grad():
        assert torch.equal(policy.forward(policy.collate(items)).logprobs, sampled)
