"""Steps of a flow that learn alike: both ways by hand, against their papers' figures, and where they must equal plain GRPO."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.learner.objectives.balance import balanced, normalised_log_ratio
from actors.learner.objectives.grpo import Grpo, grpo_loss
from actors.learner.objectives.settings import FlowGrpoSection, StepBalance
from actors.policy.protocol import PolicyOutput
from actors.records import SdeSpec
from actors.vdm import flow_sde
from actors.vdm.flow_sde import Transition, rectification
from actors.vdm.text_encoder import Captions
from actors.vdm.trajectories import Condition, VdmBatch, window_parts

GRID = torch.tensor([1.0, 0.95, 0.86, 0.7, 0.45, 0.2, 0.0], dtype=torch.float64)
SCHEDULES = (("flow", 0.7), ("wan", 0.6), ("dance", 0.3), ("cps", 0.5))
SHAPE = (2, 2, 3, 3)
VALUES = math.prod(SHAPE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(schedule: str, level: float, i: int, x: Tensor, v: Tensor) -> Transition:
    """The step of the grid; its sigmas are float64, so only x and v are rounded to float32."""
    sigma, following = (GRID[i + k].expand(len(x)) for k in (0, 1))
    return flow_sde.transition(x, v, sigma, following, GRID[1], schedule, level)


def weights_of(schedule: str, level: float, first: int, last: int, size: int = 1) -> Tensor:
    """Weight of each place of a window of ``size`` steps, (places, size)."""
    places = range(first, last - size + 1)
    return torch.stack([rectification(GRID, SdeSpec(schedule, level, s, size, (first, last))) for s in places])


@pytest.mark.parametrize(("schedule", "level"), SCHEDULES[:3])
def test_rectification_is_the_papers_formula(schedule: str, level: float) -> None:
    """Flash-GRPO: 1 / lambda = sqrt(dsigma) / s + s sqrt(dsigma) (1 - sigma) / (2 sigma), here in numpy."""
    sigma, following = GRID[:-2].numpy(), GRID[1:-1].numpy()
    below = np.where(sigma < 1, sigma, following[0])
    s = {"flow": level * np.sqrt(sigma / (1 - below)), "wan": level * sigma, "dance": np.full(5, level)}[schedule]
    root = np.sqrt(sigma - following)
    expected = 1 / (root / s + s * root * (1 - sigma) / (2 * sigma))
    found = weights_of(schedule, level, 0, 5)[:, 0]
    np.testing.assert_allclose(found.numpy(), expected / expected.mean(), rtol=1e-6)


def test_rectification_is_the_table_of_the_papers_code() -> None:
    """Its ``value_dict`` for steps 0 to 9 of Wan's 20 at shift 3, s = sigma_second · sigma (Shredded-Pork/Flash-GRPO)."""
    table = np.array([7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754])
    times = torch.linspace(1, 0, 21, dtype=torch.float64)
    grid = flow_sde.shift_sigma(times, 3.0)
    found = [float(rectification(grid, SdeSpec("wan", float(grid[1]), i, 1, (0, 10)))) for i in range(10)]
    np.testing.assert_allclose(found, table / table.mean(), rtol=2e-3)


@pytest.mark.parametrize(("schedule", "level"), SCHEDULES)
def test_rectified_steps_have_gradients_of_one_size(schedule: str, level: float) -> None:
    """By autograd: lambda · d log p / d v is the step's noise over the number of values, wherever the step is."""
    sizes = []
    for i in range(5):
        x, v = normal(3, *SHAPE, seed=i), normal(3, *SHAPE, seed=10 + i).requires_grad_()
        step, noise = step_of(schedule, level, i, x, v), normal(3, *SHAPE, seed=20 + i)
        after = (step.mean + step.std.view(-1, 1, 1, 1, 1) * noise).detach()
        squares = ((after - step.mean) / step.std.view(-1, 1, 1, 1, 1)).square().flatten(1).mean(dim=1)
        (gradient,) = torch.autograd.grad((-squares / 2).sum(), v)
        sizes.append(float(gradient.norm() / noise.norm()))
    plain, weights = np.array(sizes), weights_of(schedule, level, 0, 5)[:, 0].numpy()
    rectified = plain * weights
    np.testing.assert_allclose(rectified, rectified.mean(), rtol=1e-6)
    assert plain.max() > 1.2 * plain.min(), "without the weights they differ"


@pytest.mark.parametrize(("first", "last", "size"), [(0, 5, 1), (1, 5, 2), (0, 5, 3), (2, 4, 2)])
def test_weights_are_one_on_average_over_a_runs_windows(first: int, last: int, size: int) -> None:
    weights = weights_of("flow", 0.7, first, last, size)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-6)
    assert weights.shape == (last - first - size + 1, size)
    alone = rectification(GRID, SdeSpec("flow", 0.7, 2, 1))
    assert alone.tolist() == pytest.approx([1.0]), "a window that stays weighs by its own mean"


# --- in the loss -----------------------------------------------------------------------------------------------------


def batch_of(start: int, size: int, count: int = 3) -> tuple[VdmBatch, Tensor]:
    """A window of ``flow`` steps drawn by velocities ``old``, and these velocities (size, count, ...), all float64."""
    old = normal(size, count, *SHAPE, seed=7)
    before, after = [normal(count, *SHAPE, seed=8)], []
    for k in range(size):
        step = step_of("flow", 0.7, start + k, before[-1], old[k])
        after.append(step.mean + step.std.view(-1, 1, 1, 1, 1) * normal(count, *SHAPE, seed=30 + k))
        before.append(after[-1])
    sigmas = torch.stack([torch.stack([GRID[start + k + d].expand(count) for d in (0, 1)]) for k in range(size)])
    weights = rectification(GRID, SdeSpec("flow", 0.7, start, size, (0, 5)))
    batch = VdmBatch(
        before=torch.stack(before[:-1]),
        after=torch.stack(after),
        sigmas=sigmas,
        second=GRID[1].expand(count),
        mask=torch.ones(count, size, dtype=torch.bool),
        rectified=weights.expand(count, size),
        condition=Condition(
            Captions(torch.zeros(count, 1, 1), torch.ones(count, 1, dtype=torch.bool)), None, None, torch.ones(count)
        ),
        schedule="flow",
        level=0.7,
    )
    return batch, old


def output(batch: VdmBatch, start: int, velocities: Tensor) -> PolicyOutput:
    """What a policy with these velocities makes of ``batch``."""
    steps = [step_of("flow", 0.7, start + k, x, v) for k, (x, v) in enumerate(zip(batch.before, velocities))]
    terms = [
        (-((after - s.mean) ** 2) / (2 * s.std.view(-1, 1, 1, 1, 1) ** 2)).flatten(1).mean(dim=1) - torch.log(s.std)
        for after, s in zip(batch.after, steps)
    ]
    return PolicyOutput(
        torch.stack(terms, dim=1),
        batch.mask,
        mean=torch.stack([s.mean for s in steps], dim=1),
        std=torch.stack([s.std for s in steps], dim=1),
    )


ADVANTAGES = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def total(how: StepBalance, out: PolicyOutput, old: PolicyOutput, batch: VdmBatch, clip: float = 9.0) -> Tensor:
    objective = Grpo(FlowGrpoSection(step_balance=how, clip_low=clip, clip_high=clip, kl_beta=0.0, loss_norm="token"))
    log_ratio, weights = balanced(how, out, old, batch)
    return objective.loss(
        out.logprobs,
        old.logprobs,
        ADVANTAGES,
        out.mask,
        rollout_logprobs=old.logprobs,
        log_ratio=log_ratio,
        step_weights=weights,
    )[0]


def test_the_normalised_log_ratio_has_neither_bias_nor_std_in_it() -> None:
    """GRPO-Guard's formula comes to mean(eps d), with the noise eps of the step and d the difference of the means."""
    batch, velocities = batch_of(1, 3)
    old, out = (output(batch, 1, v) for v in (velocities, velocities + 0.3 * normal(*velocities.shape, seed=9)))
    assert old.mean is not None and out.mean is not None and old.std is not None
    noise = (batch.after.transpose(0, 1) - old.mean) / old.std.view(3, 3, 1, 1, 1, 1)
    expected = (noise * (out.mean - old.mean)).flatten(2).mean(dim=2)
    torch.testing.assert_close(normalised_log_ratio(out, old), expected, rtol=1e-6, atol=1e-9)
    # Turned about, the noise of the old policy gives the opposite ratio: symmetric, unlike the plain one.
    mirrored = old.mean - (batch.after.transpose(0, 1) - old.mean)
    plain = -((mirrored - out.mean) ** 2 - (mirrored - old.mean) ** 2).flatten(2).mean(dim=2) / (2 * old.std**2)
    assert torch.all((out.logprobs - old.logprobs) + plain < 0), "its two directions do not cancel: it is drawn below 1"


def test_a_normalised_surrogate_has_gradients_of_one_size() -> None:
    """Before the first update, schedule flow: |d surrogate / d v| = |A| |eps| (1 + a^2 / 2) / values, at any step but sigma = 1."""
    for start in (1, 2, 3, 4):
        batch, velocities = batch_of(start, 1)
        fresh = velocities.clone().requires_grad_()
        old = output(batch, start, velocities)
        (gradient,) = torch.autograd.grad(total("ratio_norm", output(batch, start, fresh), old, batch), fresh)
        assert old.mean is not None and old.std is not None
        noise = (batch.after[0] - old.mean[:, 0]) / old.std.view(3, 1, 1, 1, 1)
        expected = ADVANTAGES.view(-1, 1, 1, 1, 1) * noise * (1 + 0.7**2 / 2) / VALUES
        torch.testing.assert_close(gradient[0], expected, rtol=1e-5, atol=1e-9)


def test_loss_of_both_ways_by_hand() -> None:
    """In numpy, several updates away from the old policy, with a clip that cuts; the KL is added without a weight."""
    batch, velocities = batch_of(1, 2)
    old, out = (output(batch, 1, v) for v in (velocities, velocities + 0.2 * normal(*velocities.shape, seed=9)))
    assert old.mean is not None and out.mean is not None and out.std is not None
    difference = (out.logprobs - old.logprobs).numpy()
    squared = ((out.mean - old.mean).numpy() ** 2).reshape(3, 2, -1).mean(-1)
    std, spans = out.std.numpy(), (GRID[1:3] - GRID[2:4]).numpy()
    log_ratios = {"rectify": difference, "ratio_norm": (difference + squared / (2 * std**2)) * std}
    weights = {"rectify": batch.rectified.numpy(), "ratio_norm": np.broadcast_to(1 / spans, (3, 2))}
    kl, a = normal(3, 2, seed=3).abs(), ADVANTAGES.numpy()[:, None]
    for how, clip in (("rectify", 5e-3), ("ratio_norm", 1e-3)):
        ratio = np.exp(log_ratios[how])
        surrogate = -np.minimum(ratio * a, np.clip(ratio, 1 - clip, 1 + clip) * a) * weights[how]
        assert (np.abs(ratio - 1) > clip).any() and (np.abs(ratio - 1) < clip).any()
        log_ratio, step_weights = balanced(how, out, old, batch)  # type: ignore[arg-type]
        found, stats = grpo_loss(
            out.logprobs,
            old.logprobs,
            ADVANTAGES,
            out.mask,
            clip_low=clip,
            clip_high=clip,
            loss_norm="token",
            normaliser=6.0,
            kl=kl,
            beta=0.5,
            log_ratio=log_ratio,
            step_weights=step_weights,
        )
        np.testing.assert_allclose(float(found), (surrogate + 0.5 * kl.numpy()).sum() / 6, rtol=1e-6)
        assert stats.ratio == pytest.approx(ratio.sum(), rel=1e-6)


def test_a_window_that_stays_is_plain_grpo() -> None:
    """Of one step in one place, rectify weighs 1; ratio_norm's first gradient is plain GRPO's times std / dsigma."""
    batch, velocities = batch_of(2, 1)
    still = rectification(GRID, SdeSpec("flow", 0.7, 2, 1, (2, 3)))
    batch = VdmBatch(**{**vars(batch), "rectified": still.expand(3, 1)})
    old = output(batch, 2, velocities)
    gradients = {}
    for how in ("none", "rectify", "ratio_norm"):
        fresh = velocities.clone().requires_grad_()
        value = total(how, output(batch, 2, fresh), old, batch)  # type: ignore[arg-type]
        (gradients[how],) = torch.autograd.grad(value, fresh)
    assert old.std is not None
    torch.testing.assert_close(gradients["rectify"], gradients["none"])
    factor = float(old.std[0, 0] / (GRID[2] - GRID[3]))
    torch.testing.assert_close(gradients["ratio_norm"], gradients["none"] * factor)


def test_a_cut_window_has_the_steps_of_the_whole() -> None:
    batch, velocities = batch_of(1, 3)
    parts = [part for _, part in window_parts(batch, 2)]
    for name in ("rectified", "spans"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))
    old, out = (output(batch, 1, v) for v in (velocities, velocities + 0.1))
    cuts = (slice(0, 2), slice(2, 3))
    assert PolicyOutput.joined([old.steps(cut) for cut in cuts]).mean is not None
    for how, name in itertools.product(("rectify", "ratio_norm"), (0, 1)):
        whole = balanced(how, out, old, batch)[name]  # type: ignore[arg-type]
        if whole is None:
            continue
        pieces = []
        for cut, part in zip(cuts, parts, strict=True):
            piece = PolicyOutput(out.logprobs[:, cut], out.mask[:, cut], out.mean[:, cut], out.std[:, cut])  # type: ignore[index]
            found = balanced(how, piece, old.steps(cut), part)[name]  # type: ignore[arg-type]
            assert found is not None
            pieces.append(found)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


def test_padding_of_any_value_reaches_neither_value_nor_gradient() -> None:
    batch, velocities = batch_of(1, 2)
    short = torch.tensor([[True, True], [True, False], [True, False]])
    batch = VdmBatch(**{**vars(batch), "mask": short})
    old = output(batch, 1, velocities)
    spoilt = velocities.clone()
    spoilt[1, 1:] += 50.0
    for how in ("rectify", "ratio_norm"):
        found = []
        for values in (velocities, spoilt):
            fresh = values.clone().requires_grad_()
            value = total(how, output(batch, 1, fresh), old, batch)  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(value, fresh)
            assert not gradient[1, 1:].any()
            found.append(value.detach())
        torch.testing.assert_close(*found)
