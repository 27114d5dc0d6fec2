"""Guidance and the forward-process objectives: what their loss reads, and what sampling with and without guidance draws afterwards.

That GRPO's policy is the guided velocity is in ``tests/actors/learner/test_trainer.py``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.objectives.forward import square
from actors.learner.trainer import Trainer
from actors.policy.settings import LoraSection
from actors.records import RenderRequest, VdmExperience
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample, sample_latents
from tests.actors.learner.objectives.test_forward import SETTINGS, adapter, equal, plan, spec_of

pytestmark = pytest.mark.slow
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def artist(tiny_vdm_dir: Path) -> VdmPolicy:
    return VdmPolicy.load(tiny_vdm_dir, lora=LoraSection(rank=4, alpha=8.0))


def requests(guidance: float) -> list[RenderRequest]:
    return [
        RenderRequest(f"s{g}", i, f"the {c} circle rises", FRAMES, 9, 4, guidance, noise_seed=10 * g + i, ends=True)
        for g, c in enumerate(("red", "blue"))
        for i in range(2)
    ]


def rollout(artist: VdmPolicy, guidance: float) -> list[VdmExperience]:
    return [
        VdmExperience(c.sample_id, c.index, c.caption, FRAMES, c.trajectory, (-1.0) ** c.index, c.condition)
        for c in sample(artist, requests(guidance))
        if c.trajectory is not None
    ]


def trained(artist: VdmPolicy, name: str, items: list[VdmExperience], mesh: DeviceMesh, epochs: int = 8) -> Trainer:
    trainer = Trainer(copy.deepcopy(artist), spec_of(name), mesh, torch.device("cpu"))
    trainer.optimizer.steps = 1  # where the gate, which alone reads the guidance, is not due
    trainer.update(plan(items), epochs=epochs)
    return trainer


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_does_not_read_the_guidance(artist: VdmPolicy, mesh: DeviceMesh, name: str) -> None:
    """The same clips, said to be of a rollout with and without guidance, teach the same bits."""
    guided = rollout(artist, 3.0)
    plain = [
        replace(
            item,
            trajectory=replace(item.trajectory, guidance=1.0),
            condition=replace(item.condition, negative=None),
        )
        for item in guided
        if item.condition is not None
    ]
    assert all(item.condition is not None and item.condition.negative is not None for item in guided)
    assert equal(*(adapter(trained(artist, name, items, mesh, epochs=2)) for items in (guided, plain)))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rolled", [1.0, 3.0])
def test_the_conditional_velocity_learns_and_the_negative_prompts_follows_it(
    artist: VdmPolicy, mesh: DeviceMesh, name: str, rolled: float
) -> None:
    """No target is given to the negative prompt's velocity; it moves in the same direction, and less far."""
    items = rollout(artist, rolled)
    learner = trained(artist, name, items, mesh).policy
    batch = artist.collate(items)
    at = artist.noised(batch, list(range(len(items))))
    encoded = [artist.encode(item.caption, FRAMES, 2.0) for item in items]

    def velocity(policy: VdmPolicy, guidance: float) -> Tensor:
        with torch.no_grad():
            return policy.velocity(at.noisy, at.sigma, policy.join(encoded, [guidance] * len(items)))

    before, after = ({g: velocity(policy, g) for g in (1.0, 2.0, 3.0)} for policy in (artist, learner))  # type: ignore[arg-type]
    moved = after[1.0] - before[1.0]
    negative = [2 * v[1.0] - v[2.0] for v in (before, after)]  # of v2 = v- + 2 (v - v-)
    followed = negative[1] - negative[0]
    assert 0.2 < float((square(followed).mean() / square(moved).mean()).sqrt()) < 1.0
    assert torch.nn.functional.cosine_similarity(moved.flatten(), followed.flatten(), dim=0) > 0.5
    expected = followed + 3.0 * (moved - followed)
    torch.testing.assert_close(after[3.0] - before[3.0], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("used", [1.0, 3.0])
def test_what_was_learnt_shows_in_clips_drawn_with_and_without_guidance(
    artist: VdmPolicy, mesh: DeviceMesh, used: float
) -> None:
    """A rollout without guidance; what it taught moves both kinds of clips towards the good ones and away from the bad ones."""
    items = rollout(artist, 1.0)
    learner = trained(artist, "nft", items, mesh).policy
    asked = [replace(r, guidance=used, ends=False) for r in requests(1.0)]
    with torch.no_grad():
        drawn = [sample_latents(policy, asked, check(artist, asked[0]))[0] for policy in (artist, learner)]  # type: ignore[arg-type]
    ends = torch.from_numpy(np.stack([item.trajectory.latents[-1] for item in items]))
    good, bad = ends[0::2], ends[1::2]
    towards = (good - bad).repeat_interleave(2, dim=0)
    change = ((drawn[1] - drawn[0]) * towards).flatten(1).sum(dim=1)
    assert change.sum() > 0 and (change > 0).sum() >= 3
