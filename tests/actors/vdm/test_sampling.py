"""How reference frames condition the sampler, and what a clip may and may not depend on.

That the sampler is diffusers' own, rung by rung, is shown in test_parity_wan_pipeline.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from actors.failures import BadSampleError
from actors.records import SdeSpec
from actors.vdm.frames import frames_to_video, select_reference_frames, video_to_frames
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import NotWanted, check, sample, sample_latents
from cluster.errors import CheckpointError, ConfigError

SHAPE = (16, 3, 4, 4)
SDE = SdeSpec("flow", 0.7, 0, 2)


@pytest.fixture(scope="module")
def stock(tiny):
    pipe = WanPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_reference_latents_are_each_frames_own(policy, stock, make_request):
    frames = make_request(references=3).reference_frames
    latents = policy.encode_references(frames)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (stock.vae.config.latents_mean, stock.vae.config.latents_std))
    assert latents.shape == (16, 3, 4, 4)
    for i in range(3):
        with torch.no_grad():
            alone = stock.vae.encode(frames_to_video(frames[i : i + 1])[None]).latent_dist.mode()[0, :, 0]
        assert torch.allclose(latents[:, i], (alone - mean) / std, atol=1e-5)


def test_references_are_clean_tokens_in_front(policy, make_request):
    """velocity() against a call of the transformer written out: references first, their times 0, only targets kept."""
    request = make_request(references=2, guidance=3.0)
    condition = policy.condition([request.caption], [request.reference_frames], [3.0])
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    ours = policy.velocity(x, torch.tensor([0.7]), condition)
    times = torch.tensor([[0.0] * 2 * 16 + [700.0] * 3 * 16])
    whole = torch.cat([policy.encode_references(request.reference_frames)[None], x], dim=2)
    with torch.no_grad():
        v = [
            policy.module(hidden_states=whole, timestep=times, encoder_hidden_states=policy.embed([caption])).sample
            for caption in ("", request.caption)
        ]
    expected = (v[0] + 3.0 * (v[1] - v[0]))[:, :, 2:]
    assert torch.allclose(ours, expected, atol=1e-5)
    other = policy.condition([request.caption], [255 - request.reference_frames], [3.0])
    assert (policy.velocity(x, torch.tensor([0.7]), other) - ours).abs().max() > 1e-3


def test_times_reach_the_model_in_float32(policy, make_request):
    """FSDP mixed precision casts the forward's inputs; 900.1 must not become 900."""
    seen = []
    handle = policy.module.condition_embedder.timesteps_proj.register_forward_hook(lambda m, a, out: seen.append(a[0]))
    cast = policy.module.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "timestep": k["timestep"].bfloat16()}), with_kwargs=True
    )
    try:
        request = make_request()
        condition = policy.condition([request.caption], [request.reference_frames], [1.0])
        policy.velocity(torch.zeros(1, *SHAPE), torch.tensor([0.9001]), condition)
    finally:
        handle.remove()
        cast.remove()
    assert seen[0].dtype == torch.float32 and seen[0][-1].item() == pytest.approx(900.1, abs=1e-3)


@pytest.mark.parametrize("schedule", ["flow", "wan", "dance", "cps"])
def test_only_the_window_is_stochastic_and_the_last_step_is_ode(policy, make_request, schedule):
    sde = SdeSpec(schedule, 0.5, 1, 2)
    request = make_request(sde=sde)
    latents, (path,) = sample_latents(policy, [request], SHAPE)
    assert path.latents.shape == (3, *SHAPE) and path.logprobs.shape == (2,) and path.sigmas.shape == (5,)
    assert np.isfinite(path.logprobs).all()
    condition = policy.condition([request.caption], [request.reference_frames], [1.0])
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))[None]
    with torch.no_grad():
        sigmas = torch.from_numpy(path.sigmas)
        first = noise + (sigmas[1] - sigmas[0]) * policy.velocity(noise, sigmas[:1], condition)
        assert torch.allclose(torch.from_numpy(path.latents[:1]), first, atol=1e-5)
        after = torch.from_numpy(path.latents[2:])
        last = after + (sigmas[4] - sigmas[3]) * policy.velocity(after, sigmas[3:4], condition)
    assert torch.allclose(latents, last, atol=1e-5)
    other = sample_latents(policy, [make_request(sde=sde, sde_seed=99)], SHAPE)[1][0]
    assert np.array_equal(other.latents[0], path.latents[0]) and not np.allclose(other.latents[1], path.latents[1])


def test_a_clip_depends_on_its_own_seeds_only(policy, make_request):
    mixed = [
        make_request(0, sde=SDE),
        make_request(1, guidance=2.0),
        make_request(2, caption="blue square", sde=SDE, noise_seed=5),
        make_request(3, references=0),
        make_request(4, sde=SDE),
    ]
    together = sample(policy, mixed)
    assert [clip.index for clip in together] == [0, 1, 2, 3, 4]
    for clip, request in zip(together, mixed):
        alone = sample(policy, [request])[0]
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1
        if request.sde is not None:
            assert np.allclose(clip.trajectory.latents, alone.trajectory.latents, atol=1e-5)
            assert np.allclose(clip.trajectory.logprobs, alone.trajectory.logprobs, atol=1e-5)
    again = sample(policy, mixed)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(together, again))


def test_a_group_may_share_its_initial_noise(policy, make_request):
    shared = sample(policy, [make_request(i, sde=SDE, noise_seed=3) for i in range(3)])
    starts = [clip.trajectory.latents[0] for clip in shared]
    assert np.array_equal(starts[0], starts[1]) and np.array_equal(starts[0], starts[2])
    ends = [clip.trajectory.latents[-1] for clip in shared]
    assert not np.allclose(ends[0], ends[1]) and not np.allclose(ends[1], ends[2])
    own = sample(policy, [make_request(i, sde=SDE, noise_seed=i) for i in range(2)])
    assert not np.allclose(own[0].trajectory.latents[0], own[1].trajectory.latents[0])


@pytest.mark.parametrize("sde", [None, SDE])
def test_looking_on_step_by_step_changes_nothing_of_a_clip(policy, make_request, sde):
    requests = [make_request(0, sde=sde), make_request(1, sde=sde, guidance=2.0)]
    seen = []
    watched = sample(policy, requests, on_step=lambda done, steps: seen.append((done, steps)))
    assert seen == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)]  # two batches: their guidance differs
    for ours, plain in zip(watched, sample(policy, requests), strict=True):
        assert ours.frames.tobytes() == plain.frames.tobytes()
        if sde is not None:
            assert ours.trajectory.latents.tobytes() == plain.trajectory.latents.tobytes()
            assert ours.trajectory.logprobs.tobytes() == plain.trajectory.logprobs.tobytes()


def test_a_drawing_that_is_not_wanted_any_more_ends_at_its_step(policy, make_request):
    calls = []
    handle = policy.module.register_forward_hook(lambda *_: calls.append(1))

    def on_step(done: int, steps: int) -> None:
        if done == 2:
            raise NotWanted

    try:
        with pytest.raises(NotWanted):
            sample(policy, [make_request(0), make_request(1)], on_step=on_step)
    finally:
        handle.remove()
    assert len(calls) == 2


def test_requests_that_cannot_succeed_say_why(policy, make_request):
    for change, words in (
        ({"num_frames": 10}, r"num_frames=10.*use 9 or 13"),
        ({"num_frames": 0}, "num_frames=0.*use 1 or 5"),
        ({"reference_frames": np.zeros((2, 36, 32, 3), np.uint8)}, "height=36.*multiple of 8.*use 32 or 40"),
        ({"reference_frames": np.zeros((2, 32, 31, 3), np.uint8)}, "width=31.*use 24 or 32"),
        ({"reference_frames": np.zeros((2, 32, 32, 3), np.float32)}, "must be uint8"),
        ({"num_frames": 33 * 4 + 1}, "rope_max_seq_len"),
        ({"caption": "  "}, "caption is empty"),
        ({"guidance": 0.5}, "guidance=0.5"),
    ):
        with pytest.raises(BadSampleError, match=words):
            sample(policy, [make_request(**change)])
    with pytest.raises(ConfigError, match="does not fit 4 denoising steps"):
        sample(policy, [make_request(sde=SdeSpec("flow", 0.7, 2, 2))])


def test_reference_frames_are_spread_and_end_with_the_last():
    video = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert select_reference_frames(video, 3)[:, 0, 0, 0].tolist() == [0, 4, 8]
    assert select_reference_frames(video, 1)[:, 0, 0, 0].tolist() == [8]
    assert len(select_reference_frames(video, 0)) == 0
    assert select_reference_frames(video[:2], 4)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(BadSampleError, match="without frames"):
        select_reference_frames(video[:0], 2)


def test_frames_survive_the_way_to_the_vae_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(video_to_frames(frames_to_video(frames)), frames)


def test_a_policy_loads_only_what_it_needs(tiny, make_request, tmp_path):
    learner = VdmPolicy.load(tiny, components=("transformer", "vae_encoder", "text_encoder"), reference_frames=2)
    assert learner.vae.decoder is None
    assert learner.encode_references(make_request().reference_frames).shape == (16, 2, 4, 4)
    with pytest.raises(CheckpointError, match="vae_decoder"):
        sample(learner, [make_request()])
    with pytest.raises(BadSampleError, match="set to 2"):
        check(learner, make_request(references=1))
    bare = VdmPolicy.load(tiny, components=("transformer",))
    with pytest.raises(CheckpointError, match="text_encoder"):
        bare.embed(["red"])
    with pytest.raises(CheckpointError, match="vae_encoder"):
        bare.encode_references(make_request().reference_frames)
    with pytest.raises(CheckpointError, match="not a diffusers pipeline folder"):
        VdmPolicy.load(tmp_path)
