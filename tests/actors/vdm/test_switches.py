"""What makes the artist faster has a switch, and on and off agree: bit for bit, or up to float noise where the sums change."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch

from actors.records import SdeSpec, VdmExperience
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.settings import VdmPoolSection

SDE = SdeSpec("flow", 0.7, 0, 2)


def drawn(policy: VdmPolicy, requests: list) -> tuple[np.ndarray, np.ndarray]:
    """Return the clips as integers, and the log-probabilities."""
    clips = sample(policy, requests)
    return np.stack([c.frames for c in clips]).astype(int), np.stack([c.trajectory.logprobs for c in clips])


@pytest.fixture
def requests(make_request) -> list:
    captions = ("the red circle moves up", "a blue square", "the red circle moves up and then down", "green")
    return [make_request(i, caption=c, noise_seed=i, sde=SDE) for i, c in enumerate(captions)]


def test_two_times_embedded_once_are_the_same_bits(tiny, requests):
    shared, single = (VdmPolicy.load(tiny, shared_times=on) for on in (True, False))
    seen: dict[bool, list[int]] = {True: [], False: []}
    for on, policy in ((True, shared), (False, single)):
        policy.module.condition_embedder.timesteps_proj.register_forward_hook(
            lambda _m, args, _out, on=on: seen[on].append(len(args[0]))
        )
    ours, theirs = drawn(shared, requests), drawn(single, requests)
    assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    assert set(seen[True]) == {2 * len(requests)} and min(seen[False]) > 2 * len(requests)


def test_two_times_give_the_learner_the_same_gradient(tiny, requests):
    items = [
        VdmExperience(c.sample_id, c.index, c.caption, r.reference_frames, c.trajectory, 1.0, c.condition)
        for c, r in zip(sample(VdmPolicy.load(tiny), requests), requests, strict=True)
    ]
    gradients = []
    for on in (True, False):
        policy = VdmPolicy.load(tiny, shared_times=on)
        policy.forward(policy.collate(items)).logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None]))
    # The time embedding's own gradient is summed in another order.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


def test_a_copied_transformer_keeps_the_two_times(tiny, requests):
    """A learner of full weights keeps a frozen copy as its reference."""
    policy = VdmPolicy.load(tiny)
    before = drawn(policy, requests)
    policy.module = copy.deepcopy(policy.module)
    after = drawn(policy, requests)
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_captions_embedded_in_one_batch_differ_by_float_noise(tiny, requests):
    alone, together = VdmPolicy.load(tiny), VdmPolicy.load(tiny, settings=VdmPoolSection(max_embed=32))
    calls: list[int] = []
    together.embedder.encoder.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
    ours, theirs = drawn(together, requests), drawn(alone, requests)
    assert calls == [len({r.caption for r in requests})]
    for request in requests:
        torch.testing.assert_close(
            together.embed([request.caption]), alone.embed([request.caption]), rtol=1e-4, atol=1e-5
        )
    assert np.abs(ours[0] - theirs[0]).max() <= 1
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    assert together.counters()["captions"] == alone.counters()["captions"] == 4


def test_channels_last_decodes_the_same_up_to_float_noise(tiny, requests):
    last, first = VdmPolicy.load(tiny, settings=VdmPoolSection(channels_last=True)), VdmPolicy.load(tiny)
    convolution = next(m for m in last.vae.decoder.modules() if isinstance(m, torch.nn.Conv3d) and m.in_channels > 1)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d)
    ours, theirs = drawn(last, requests), drawn(first, requests)
    assert np.abs(ours[0] - theirs[0]).max() <= 1 and np.array_equal(ours[1], theirs[1])


@pytest.mark.chaos
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_blocks_draw_the_same_up_to_float_noise(tiny, requests, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    torch._dynamo.reset()
    compiled, plain = VdmPolicy.load(tiny, settings=VdmPoolSection(compile_blocks=True)), VdmPolicy.load(tiny)
    counted = torch._dynamo.utils.counters
    counted.clear()
    ours, theirs = drawn(compiled, requests), drawn(plain, requests)
    assert counted["stats"]["unique_graphs"] >= 1
    assert np.abs(ours[0] - theirs[0]).max() <= 1
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
