"""The flow as VANS was released: Euler steps, noise levels and weights of supervised training.

The constants are what the release's own scheduler gives (KlingAIResearch/VANS, ``vans/schedulers/flow_match.py``, February 2026): its
FlowMatchScheduler(shift=5, sigma_min=0, extra_one_step=True), whose tables were read after set_timesteps(10) and after
set_timesteps(1000, training=True).
"""

from __future__ import annotations

import pytest
import torch

from actors.records import SdeSpec, VdmExperience
from actors.vdm import flow_sde
from actors.vdm.flow_sde import FlowMatchingSpec, bell_weights, sample_sigmas, sigma_grid
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample, sample_latents

TEN = [
    *(1.0, 0.97826087474823, 0.9523810148239136, 0.9210526347160339, 0.882352888584137),
    *(0.8333333134651184, 0.7692307829856873, 0.6818181872367859, 0.5555555820465088, 0.3571428656578064),
]
WEIGHTS = {  # place in the table of 1000: sigma, weight
    0: (1.0, 0.0),
    1: (0.9997997879981995, 0.0012814513174816966),
    250: (0.9375, 0.3979516625404358),
    500: (0.8333333134651184, 1.0248619318008423),
    833: (0.5005995631217957, 2.0764002799987793),
    900: (0.3571428656578064, 1.8653461933135986),
    999: (0.004980080295354128, 0.031879011541604996),
}
RELEASED = FlowMatchingSpec(caption_dropout=0.0, timesteps="uniform", weighting="bell")


def test_even_steps_are_the_releases_and_the_last_ends_at_zero() -> None:
    grid = sigma_grid(10, 5.0, "even")
    torch.testing.assert_close(grid[:-1], torch.tensor(TEN), rtol=1e-6, atol=0)
    assert grid[0] == 1 and grid[-1] == 0 and grid.dtype == torch.float32
    assert float((grid - sigma_grid(10, 5.0)).abs().max()) > 0.3  # the stock scheduler's last step begins elsewhere
    assert flow_sde.removable_steps(10, 5.0, "flow", 0.7, "even") == range(9)  # it leaves room for one step more than
    assert flow_sde.removable_steps(10, 5.0, "flow", 0.7) == range(8)  # the stock grid, whose last sigma is .02


def test_levels_and_weights_are_the_releases() -> None:
    grid = sigma_grid(1000, 5.0, "even")
    weights = bell_weights(grid[:-1], 5.0)
    for place, (sigma, weight) in WEIGHTS.items():
        assert float(grid[place]) == pytest.approx(sigma, rel=1e-6)
        assert float(weights[place]) == pytest.approx(weight, rel=1e-4, abs=1e-7)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5) and weights.min() == 0
    drawn = sample_sigmas(20_000, RELEASED, 5.0, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) <= set(grid[:-1].tolist()) and len(set(drawn.tolist())) == 1000
    unshifted = drawn / (5 - 4 * drawn)
    assert float(unshifted.mean()) == pytest.approx(0.5, abs=0.01) and float(unshifted.var()) == pytest.approx(
        1 / 12, rel=0.03
    )


def test_the_loss_is_the_weighted_error_written_out(tiny, make_request) -> None:
    policy = VdmPolicy.load(tiny, shift=5.0, supervised=RELEASED)
    batch = [
        (make_request(i).reference_frames, f"clip {i}", torch.full((9, 32, 32, 3), 60 * i).byte().numpy())
        for i in range(3)
    ]
    with torch.no_grad():
        found = policy.sft_loss(batch, generator=torch.Generator().manual_seed(2))
    generator, total = torch.Generator().manual_seed(2), 0.0
    for references, caption, target in batch:
        torch.rand((), generator=generator)  # whether the caption is dropped
        place = int(torch.randint(1000, (1,), generator=generator))
        noise = torch.randn(16, 3, 4, 4, generator=generator)
        u = 1 - place / 1000
        sigma = 5 * u / (1 + 4 * u)
        clean = policy.encode_targets([target])
        with torch.no_grad():
            condition = policy.condition([caption], [references], [1.0])
            v = policy.velocity((1 - sigma) * clean + sigma * noise, torch.tensor([sigma]), condition)
        weight = bell_weights(torch.tensor(sigma), 5.0)
        total += float(weight * ((v - (noise - clean)) ** 2).mean())
    assert float(found.total) == pytest.approx(total, rel=1e-4)
    with torch.no_grad():
        plain = VdmPolicy.load(tiny, shift=5.0).sft_loss(batch, generator=torch.Generator().manual_seed(2))
    assert float(plain.total) != pytest.approx(total, rel=1e-2)


def test_clips_and_trajectories_follow_the_even_steps_and_the_ratio_is_one(tiny, make_request) -> None:
    policy = VdmPolicy.load(tiny, shift=5.0, grid="even")
    request = make_request(steps=10)
    latents, _ = sample_latents(policy, [request], (16, 3, 4, 4))
    x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(request.noise_seed))
    with torch.no_grad():
        condition = policy.condition([request.caption], [request.reference_frames], [1.0])
        for sigma, following in zip(TEN, [*TEN[1:], 0.0], strict=True):
            x = x + (following - sigma) * policy.velocity(x, torch.tensor([sigma]), condition)
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    asked = make_request(sde=SdeSpec("flow", 0.7, 0, 2))
    (clip,) = sample(policy, [asked])
    item = VdmExperience("s", 0, asked.caption, asked.reference_frames, clip.trajectory, 1.0, clip.condition)
    learner = VdmPolicy.load(tiny, components=("transformer",))  # the grid comes with the trajectory
    with torch.no_grad():
        out = learner.forward(learner.collate([item]))
    assert torch.equal(out.logprobs, learner.rollout_logprobs([item]))
