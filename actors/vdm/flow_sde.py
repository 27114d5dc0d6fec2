"""Sampling a flow-matching model as an ODE or as an SDE: sigma grid, one step, its log-probability and KL, the SDE
window.

Responsible for the mathematics alone, on tensors that are passed in; it knows no model, no guidance and no seeds. The
sampler and the learner both call :func:`transition`, so equal inputs give equal log-probabilities. Conventions: sigma
runs from 1 (noise) to 0 (data), x_sigma = (1 - sigma) x0 + sigma eps, and the velocity is v = eps - x0.

Sources: Flow-GRPO (arXiv 2505.05470) for the SDE of a rectified flow, DanceGRPO (arXiv 2505.07818) for the constant
noise level, MixGRPO (arXiv 2507.21802) for the sliding window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from actors.records import SdeSpec, derive_seed
from actors.vdm.schedules import SCHEDULES, NoiseSchedule
from actors.vdm.settings import WindowKind, WindowPer
from cluster.errors import ConfigError

NUM_TRAIN_TIMESTEPS = 1000


def sigma_grid(steps: int, shift: float = 3.0, grid: str = "diffusers") -> Tensor:
    """Return the sigmas of ``steps`` Euler steps: float32 (steps + 1,), from 1 down to 0.

    ``diffusers``: FlowMatchEulerDiscreteScheduler's own, so that a clip of ours equals diffusers' for the same noise. ``even``:
    linspace(1, 0, steps + 1), shifted; VANS' released code.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a sampler needs at least 1 denoising step")
    if grid == "even":
        return shift_sigma(torch.linspace(1.0, 0.0, steps + 1), shift)
    from diffusers import FlowMatchEulerDiscreteScheduler  # loads for a second: a plan does without

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.to(torch.float32)


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Return the shifted sigma of ``u`` in 0..1: shift u / (1 + (shift - 1) u), as the scheduler shifts its grid."""
    return shift * u / (1 + (shift - 1) * u)


# --- one step -------------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """The Gaussian of one step: ``mean`` float32 (B, ...), ``std`` float32 (B,); std 0 is an ODE step."""

    mean: Tensor
    std: Tensor


def ode_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return the Euler step x + (sigma' - sigma) v in float32; x, v (B, ...), sigmas (B,)."""
    return x.float() + _rows(sigma_next - sigma, x) * v.float()


def noise_scale(sigma: Tensor, sigma_second: Tensor, schedule: NoiseSchedule, level: float) -> Tensor:
    """Return s(sigma) of the SDE (``schedules``; not of ``cps``), same shape as ``sigma``.

    ``sigma_second`` is the grid's second sigma, () or (B,).
    """
    row = SCHEDULES.get(schedule)
    if row is None or row.scale is None:
        known = ", ".join(name for name, row in SCHEDULES.items() if row.scale is not None)
        raise ConfigError(f"noise schedule {schedule!r} has no s(sigma); those that have one are {known}")
    scale: Tensor = row.scale(sigma, sigma_second, level)
    return scale


def transition(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_second: Tensor, schedule: NoiseSchedule, level: float
) -> Transition:
    """Return the Gaussian from which x' of one stochastic step is drawn (ALGORITHM: flow-matching SDE).

    x, v: (B, ...); sigma, sigma_next: (B,), sigma > sigma_next; sigma_second: (B,) or a scalar tensor, the grid's
    second sigma. ``flow``, ``wan``, ``dance``: mean = x + dt [v + s^2 / (2 sigma) (x + (1 - sigma) v)], std = s
    sqrt(-dt), dt = sigma' - sigma. ``cps`` keeps the coefficients of the marginal: std = sigma' sin(level pi / 2),
    mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) x1 with x0 = x - sigma v and x1 = x + (1 - sigma) v (arXiv
    2509.05952); its level is a share of the noise per step, so, unlike the other three, more steps at one level do not
    approach the ODE's marginals. Everything is float32, whatever the model's dtype. level 0 is exactly the ODE step,
    with std 0.
    """
    x, v = x.float(), v.float()
    if level == 0:
        return Transition(ode_step(x, v, sigma, sigma_next), torch.zeros_like(sigma))
    if SCHEDULES[schedule].scale is None:
        std = sigma_next * math.sin(level * math.pi / 2)
        data, noise = x - _rows(sigma, x) * v, x + _rows(1 - sigma, x) * v
        keep = torch.sqrt(torch.clamp(sigma_next**2 - std**2, min=0))
        return Transition(_rows(1 - sigma_next, x) * data + _rows(keep, x) * noise, std)
    scale = noise_scale(sigma, sigma_second, schedule, level)
    dt = sigma_next - sigma
    drift = v + _rows(scale**2 / (2 * sigma), x) * (x + _rows(1 - sigma, x) * v)
    return Transition(x + _rows(dt, x) * drift, scale * torch.sqrt(-dt))


def draw(step: Transition, noise: Tensor) -> Tensor:
    """Return x' = mean + std * noise; noise is standard normal, of the mean's shape."""
    return step.mean + _rows(step.std, step.mean) * noise


def step_logprob(x_next: Tensor, step: Transition) -> Tensor:
    """Return the log-density of ``x_next`` under the step, **averaged** over all non-batch dimensions: float32 (B,).

    std must be positive: an ODE step has no density.
    """
    std = _rows(step.std, step.mean)
    terms = -((x_next.float() - step.mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).mean(dim=1)


def kl_gaussian(mean: Tensor, reference_mean: Tensor, std: Tensor, *, batch_dims: int = 1) -> Tensor:
    """Return KL(N(mean, std^2) || N(reference_mean, std^2)) averaged over all but the first ``batch_dims`` dimensions.

    Closed form for equal standard deviations: mean((mean - reference_mean)^2) / (2 std^2). std has the batch shape.
    """
    squared = ((mean - reference_mean) ** 2).flatten(batch_dims).mean(dim=batch_dims)
    return squared / (2 * std**2)


def rectification(sigmas: Tensor, sde: SdeSpec) -> Tensor:
    """Return lambda / mean lambda of the window's steps, float32 (window_size,): the temporal gradient rectification of Flash-GRPO.

    sigmas: (steps + 1,), the whole grid. The mean is over all steps of all windows that ``sde.reach`` has room for, so that the
    weights are 1 on average over a run, and no weight depends on the batch that it is in.

    How much a step's log-density learns from a velocity depends on where it is. With x' = mean + std eps,

        d log p / d v = (x' - mean) / std^2 · d mean / d v = eps · (d mean / d v) / std,

    and lambda = std / |d mean / d v| undoes it: lambda · |d log p / d v| = |eps| at every step. The mean is linear in v, so
    :func:`transition` of x = 0 and v = 1 is its derivative, whatever the schedule. For those with an s(sigma) that is

        1 / lambda = sqrt(dsigma) / s + s · sqrt(dsigma) (1 - sigma) / (2 sigma)    with dsigma = sigma - sigma'.

    This is the formula of arXiv 2605.15980, and its code's (Shredded-Pork/Flash-GRPO), whose loss is the surrogate times lambda
    over its mean; there the mean is the batch's.
    """
    start, size = sde.window_start, sde.window_size
    first, last = sde.reach or (start, start + size)
    now = sigmas[first:last]
    unit = torch.ones(len(now), 1, dtype=sigmas.dtype, device=sigmas.device)
    step = transition(
        torch.zeros_like(unit), unit, now, sigmas[first + 1 : last + 1], sigmas[1], sde.schedule, sde.level
    )
    weights = step.std / step.mean[:, 0].abs()
    return weights[start - first : start - first + size] / weights.unfold(0, size, 1).mean()


def _rows(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim()))


# --- which steps are stochastic -------------------------------------------------------------------------------------


def check_window(spec: SdeSpec, steps: int) -> None:
    """Raise ConfigError unless the window lies within ``steps - 1`` steps (the last is always an ODE step)."""
    end = spec.window_start + spec.window_size
    if spec.window_size < 1 or spec.window_start < 0 or end > steps - 1:
        raise ConfigError(
            f"SDE window [{spec.window_start}, {end}) does not fit {steps} denoising steps: it needs at least one step "
            f"and must end at or before step {steps - 1}, because the last step is always an ODE step"
        )
    if spec.schedule not in SCHEDULES:
        raise ConfigError(f"unknown noise schedule {spec.schedule!r}; the schedules are {', '.join(SCHEDULES)}")
    most = SCHEDULES[spec.schedule].most
    if not 0 <= spec.level <= most:
        raise ConfigError(
            f"noise level {spec.level} of schedule {spec.schedule!r} must be at least 0 (and at most {most:g})"
        )


def surplus_noise(sigmas: Tensor, schedule: NoiseSchedule, level: float) -> Tensor:
    """Return how much noise each step but the last leaves beyond what its target sigma stands for: float32 (steps - 1,).

    sigmas: (steps + 1,), a whole grid. The value is a share of the target sigma, >= 0. A stochastic step from sigma to
    sigma' keeps sigma' - std^2 / (2 sigma) of the old noise and adds std of new noise (see :func:`transition`). Together
    their variance is sigma'^2 + surplus^2 with

        surplus^2 = std^2 (sigma - sigma') / sigma + (std^2 / (2 sigma))^2.

    The model is told sigma' and removes as much. So with a share q of surplus the final latents are sqrt(1 + q^2) times
    as wide as the ODE's, where the data are small beside sigma'; the surplus of a late step stays in them as grain. It
    is 0 for ``cps``, which keeps the variance (arXiv 2509.05952 shows the surplus of the others).
    """
    sigma, following = sigmas[:-2], sigmas[1:-1]
    if SCHEDULES[schedule].scale is None:
        return torch.zeros_like(sigma)
    variance = noise_scale(sigma, sigmas[1], schedule, level) ** 2 * (sigma - following)
    return torch.sqrt(variance * (sigma - following) / sigma + (variance / (2 * sigma)) ** 2) / following


def removable_steps(steps: int, shift: float, schedule: NoiseSchedule, level: float, grid: str = "diffusers") -> range:
    """Return the steps that may be stochastic, as far as the steps after them can remove the noise; empty if none can.

    A step may where its surplus (:func:`surplus_noise`) is at most the target sigma itself: the latents then end at most
    sqrt(2) times as wide as the ODE's. The last step never may. Those that may not are late ones, and early ones too at
    extreme levels: the longest run of steps that may is returned, the first one of equals.
    """
    may = (surplus_noise(sigma_grid(steps, shift, grid), schedule, level) <= 1.0).tolist()
    best = range(0)
    for first in range(len(may)):
        run = range(first, next((i for i in range(first, len(may)) if not may[i]), len(may)))
        best = run if len(run) > len(best) else best
    return best


@dataclass(frozen=True)
class WindowSchedule:
    """Where the SDE window of ``size`` steps starts, within the steps [first, last); moves every ``every`` optimizer
    steps.

    ``fixed`` stays at ``first``; ``progressive`` moves one step towards the data and starts over at the end (MixGRPO);
    ``random`` jumps, as a pure function of (seed, number of moves), and with ``per="prompt"`` of the prompt too: each group has
    a window of its own (Flash-GRPO, arXiv 2605.15980). It has no state: a window follows from the step's number and the prompt.
    """

    kind: WindowKind
    first: int
    last: int
    size: int
    every: int = 1
    seed: int = 0
    per: WindowPer = "batch"

    def __post_init__(self) -> None:
        if self.kind not in get_args(WindowKind):
            raise ConfigError(
                f"window schedule {self.kind!r} is unknown; the schedules are {', '.join(get_args(WindowKind))}"
            )
        if self.first < 0 or self.size < 1 or self.size > self.last - self.first or self.every < 1:
            raise ConfigError(
                f"an SDE window of {self.size} steps cannot move within [{self.first}, {self.last}) every {self.every} "
                f"optimizer steps: size must be 1…{max(self.last - self.first, 1)} and every at least 1"
            )
        if self.per == "prompt" and self.kind != "random":
            raise ConfigError(f"a window per prompt is drawn by chance: schedule random, not {self.kind}")

    def start_at(self, step: int, prompt: str = "") -> int:
        """Return the first step of the window that is in force at optimizer step ``step``, for the group of ``prompt`` (its
        sample's id; not read with ``per="batch"``).
        """
        moves, places = step // self.every, self.last - self.first - self.size + 1
        if self.kind == "fixed":
            return self.first
        if self.kind == "progressive":
            return self.first + moves % places
        own = () if self.per == "batch" else (prompt,)
        return self.first + derive_seed(self.seed, "sde window", moves, *own) % places

    @property
    def reach(self) -> tuple[int, int]:
        """The steps [first, last) that its windows cover in the course of a run."""
        return self.first, self.first + self.size if self.kind == "fixed" else self.last


@dataclass(frozen=True)
class FlowMatchingSpec:
    """How the supervised loss samples and weighs sigma, and the share of captions it drops.

    ``timesteps``: ``logit_normal`` is sigma = shift(sigmoid(N(mean, std))), ``uniform`` one of the even grid's 1000 steps.
    ``weighting``: ``none``, or ``bell`` (:func:`bell_weights`).
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    caption_dropout: float = 0.1
    timesteps: str = "logit_normal"
    weighting: str = "none"


def sample_sigmas(n: int, spec: FlowMatchingSpec, shift: float, generator: torch.Generator | None) -> Tensor:
    """Return n training sigmas in (0, 1], float32 on the CPU, shifted like the sampler's grid."""
    if spec.timesteps == "uniform":
        picks = torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator)
        return sigma_grid(NUM_TRAIN_TIMESTEPS, shift, "even")[picks]
    logits = torch.randn(n, generator=generator) * spec.logit_std + spec.logit_mean
    return shift_sigma(torch.sigmoid(logits), shift)


def bell_weights(sigma: Tensor, shift: float) -> Tensor:
    """Return the weight of each supervised sigma, of its shape: exp(-2 (sigma - 1/2)^2) less its least value, which is at 1, over
    the mean that this has on the 1000 steps of the even grid.

    VANS' released code (DiffSynth's, for Wan): the middle of the noise weighs twice as much as the mean, pure noise nothing.
    """

    def bell(x: Tensor) -> Tensor:
        return torch.exp(-2 * (x - 0.5) ** 2) - math.exp(-0.5)

    return bell(sigma) / bell(sigma_grid(NUM_TRAIN_TIMESTEPS, shift, "even")[:-1]).mean()


def noisy_pair(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_sigma, v) = ((1 - sigma) x0 + sigma eps, eps - x0); clean, noise (B, C, F, h, w), sigma (B,)."""
    level = sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * clean + level * noise, noise - clean
