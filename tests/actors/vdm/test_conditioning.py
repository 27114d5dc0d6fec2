"""How the artist sees the input clip: each setting against a plain re-computation, the learner's ratio, and every path to it."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from actors.failures import BadSampleError
from actors.learner.objectives.forward import ForwardProcess
from actors.policy.settings import LoraSection
from actors.records import EncodeRequest, SdeSpec, VdmExperience
from actors.vdm.embed_worker import EmbedWorker
from actors.vdm.flow_sde import FlowMatchingSpec, noisy_pair, sample_sigmas, sigma_grid
from actors.vdm.frames import conditioning_frames
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample, sample_latents
from actors.vdm.settings import ConditioningSection
from actors.vdm.worker import VdmWorker
from pipeline.fleet.conditions import Conditions

SDE = SdeSpec("flow", 0.7, 0, 2)
TODAY = ConditioningSection()
CLIP = ConditioningSection(references="clip", take=2)
SHARED = ConditioningSection(time="shared")
RELEASED = ConditioningSection(references="clip", take=2, time="shared")
WAYS = [TODAY, CLIP, SHARED, RELEASED]


def shown(how: ConditioningSection, make_request, index: int = 0, **changes):
    """A request under ``how``: an input clip of 9 frames, or the 2 frames that are taken of it."""
    clip = np.random.default_rng(3).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    frames = conditioning_frames(clip, 2, how)
    assert len(frames) == (9 if how.references == "clip" else 2)
    return make_request(index, reference_frames=frames, noise_seed=index, **changes)


def plain_references(tiny: Path, frames: np.ndarray, how: ConditioningSection) -> torch.Tensor:
    """The clean latents (1, C, n, h, w), written out with diffusers alone."""
    vae = AutoencoderKLWan.from_pretrained(tiny / "vae").eval()
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        if how.references == "clip":
            whole = vae.encode(video).latent_dist.mode()  # 9 frames, 3 latent frames
            latents = whole[:, :, [0, 2]]
        else:
            latents = torch.cat([vae.encode(video[:, :, [i]]).latent_dist.mode() for i in (0, 1)], dim=2)
    return (latents - mean) / std


def plain_velocity(tiny: Path, policy: VdmPolicy, x, sigma, text, references, how: ConditioningSection):
    """The transformer of the folder, called as its documentation says."""
    model = WanTransformer3DModel.from_pretrained(tiny / "transformer").eval()
    times = torch.full((1,), 1000 * sigma)
    if how.time == "zero":  # 16 tokens in a latent frame
        times = torch.cat([torch.zeros(1, 2 * 16), torch.full((1, 3 * 16), 1000 * sigma)], dim=1)
    with torch.no_grad():
        return model(torch.cat([references, x], dim=2), times, text, return_dict=False)[0][:, :, 2:]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_latents_velocity_and_three_steps_are_those_written_out_plainly(tiny, make_request, how):
    policy, request = VdmPolicy.load(tiny, conditioning=how), shown(how, make_request, steps=3)
    references = plain_references(tiny, request.reference_frames, how)
    found = policy.encode_references(request.reference_frames)
    assert found.shape == (16, 2, 4, 4)
    torch.testing.assert_close(found[None], references, rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    text, sigmas = policy.embed([request.caption]), sigma_grid(3)
    with torch.no_grad():
        v = policy.velocity(x, sigmas[1][None], policy.condition([request.caption], [request.reference_frames], [1.0]))
    plain = plain_velocity(tiny, policy, x, float(sigmas[1]), text, references, how)
    torch.testing.assert_close(v, plain, rtol=1e-5, atol=1e-5)
    other = how.model_copy(update={"time": "zero" if how.time == "shared" else "shared"})
    far = plain_velocity(tiny, policy, x, float(sigmas[1]), text, references, other)
    assert float((far - v).abs().max()) > 1e-3  # so that the agreement says something
    ours, _ = sample_latents(policy, [request], (16, 3, 4, 4))
    x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(request.noise_seed))
    for here, there in pairwise(sigmas):
        x = x + (there - here) * plain_velocity(tiny, policy, x, float(here), text, references, how)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_the_ways_are_different_ones(tiny, make_request):
    frames = [sample(VdmPolicy.load(tiny, conditioning=how), [shown(how, make_request)])[0].frames for how in WAYS]
    for i, a in enumerate(frames):
        assert not any(np.array_equal(a, b) for b in frames[:i])


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_before_the_first_update_the_ratio_is_exactly_one(tiny, make_request, how, guidance):
    """The learner holds the transformer alone, and reads what the sampler was conditioned on."""
    sampler = VdmPolicy.load(tiny, lora=LoraSection(rank=4), conditioning=how)
    requests = [shown(how, make_request, i, sde=SDE, guidance=guidance) for i in range(2)]
    items = [
        VdmExperience(c.sample_id, c.index, c.caption, r.reference_frames, c.trajectory, 1.0, c.condition)
        for c, r in zip(sample(sampler, requests), requests, strict=True)
    ]
    learner = VdmPolicy.load(tiny, lora=LoraSection(rank=4), conditioning=how, components=("transformer",))
    out = learner.forward(learner.collate(items))
    assert torch.equal(torch.exp(out.logprobs.detach() - learner.rollout_logprobs(items)), torch.ones(2, 2))
    other = VdmPolicy.load(tiny, conditioning=how.model_copy(update={"time": {"zero": "shared"}.get(how.time, "zero")}))
    with torch.no_grad():  # a learner of another time would be found out
        assert not torch.equal(other.forward(other.collate(items)).logprobs, other.rollout_logprobs(items))


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_forward_objectives_find_the_workers_velocity_before_the_first_update(tiny, make_request, how):
    sampler = VdmPolicy.load(tiny, conditioning=how)
    requests = [shown(how, make_request, i, ends=True) for i in range(2)]
    items = [
        VdmExperience(c.sample_id, c.index, c.caption, r.reference_frames, c.trajectory, 1.0, c.condition)
        for c, r in zip(sample(sampler, requests), requests, strict=True)
    ]
    learner = VdmPolicy.load(tiny, conditioning=how, components=("transformer",))
    with torch.no_grad():
        assert ForwardProcess._deviation(learner.velocity, learner.collate(items)) < 1e-5


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_embed_pool_makes_bitwise_the_same(tiny, make_request, how):
    embedder = EmbedWorker("embed-0", str(tiny), conditioning=how)
    embedder.setup()
    request = shown(how, make_request, sde=SDE)

    async def submit(asked):
        return embedder.process([asked])[0].value

    made = asyncio.run(Conditions(submit, 1 << 20).of(request))
    worker = VdmWorker("vdm-0", str(tiny), options={"conditioning": how})
    worker.setup()
    clip = worker.process([request])[0].value
    assert np.array_equal(made.references, clip.condition.references) and made.references.shape == (16, 2, 4, 4)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_supervised_loss_is_that_written_out_plainly(tiny, make_request, how):
    policy, request = VdmPolicy.load(tiny, conditioning=how), shown(how, make_request)
    target = np.random.default_rng(4).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    spec = FlowMatchingSpec(caption_dropout=0.0)
    batch = [(request.reference_frames, request.caption, target)]
    with torch.no_grad():
        found = float(policy.sft_loss(batch, generator=torch.Generator().manual_seed(0), spec=spec).total)
    generator = torch.Generator().manual_seed(0)
    torch.rand((), generator=generator)  # whether the caption is dropped
    sigma = sample_sigmas(1, spec, 3.0, generator)
    clean = policy.encode_targets([target], [request.reference_frames])
    noisy, wanted = noisy_pair(clean, torch.randn(clean.shape[1:], generator=generator)[None], sigma)
    references = plain_references(tiny, request.reference_frames, how)
    v = plain_velocity(tiny, policy, noisy, float(sigma), policy.embed([request.caption]), references, how)
    assert found == pytest.approx(float(((v - wanted) ** 2).mean()), rel=1e-5)


def test_the_kept_latent_frames_are_the_released_ones(tiny):
    """33 frames make 9 latent frames, of which the release keeps 0, 1, 3, 4, 6 and 8."""
    clip = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), dtype=np.uint8)
    nine = VdmPolicy.load(tiny, conditioning=ConditioningSection(references="clip", take=9)).encode_references(clip)
    six = VdmPolicy.load(tiny, conditioning=ConditioningSection(references="clip")).encode_references(clip)
    assert nine.shape[1] == 9 and torch.equal(six, nine[:, [0, 1, 3, 4, 6, 8]])
    short = VdmPolicy.load(tiny, conditioning=ConditioningSection(references="clip")).encode_references(clip[:5])
    assert short.shape[1] == 6 and torch.equal(short[:, 0], short[:, 4]) and not torch.equal(short[:, 0], short[:, 5])


def test_a_clip_that_the_vae_would_cut_is_refused_and_the_sequence_counts_what_is_kept(tiny, make_request):
    policy = VdmPolicy.load(tiny, conditioning=CLIP)
    with pytest.raises(BadSampleError, match=r"an input clip of 8 frames cannot be encoded: .* takes 4k\+1"):
        policy.encode_references(np.zeros((8, 32, 32, 3), np.uint8))
    embedder = EmbedWorker("embed-0", str(tiny), conditioning=CLIP)
    embedder.setup()
    assert (
        "cannot be encoded" in embedder.process([EncodeRequest("s", np.zeros((8, 32, 32, 3), np.uint8), 9)])[0].message
    )
    long = make_request(reference_frames=np.zeros((117, 32, 32, 3), np.uint8), num_frames=117)
    assert check(policy, long)[1] == 30  # with the two that are kept, as many as the position embedding has
