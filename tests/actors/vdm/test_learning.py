"""The learner's side of the artist: recomputed log-probabilities, KL, adapters in and out, supervised loss."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import WanPipeline
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributions import Normal, kl_divergence

from actors.learner.sharding import shard
from actors.policy.protocol import Trainable, trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import SdeSpec, VdmExperience
from actors.vdm import flow_sde
from actors.vdm.flow_sde import FlowMatchingSpec
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample, sample_latents
from cluster.errors import CheckpointError

SDE = SdeSpec("flow", 0.7, 0, 2)


def experiences(policy, requests):
    """Sampled trajectories as the learner gets them."""
    return [
        VdmExperience(clip.sample_id, clip.index, clip.caption, request.reference_frames, clip.trajectory, 1.0)
        for clip, request in zip(sample(policy, requests), requests, strict=True)
    ]


@pytest.mark.parametrize(
    ("schedule", "references", "guidance"),
    [("flow", 2, 1.0), ("wan", 2, 1.0), ("dance", 2, 1.0), ("cps", 2, 1.0), ("flow", 0, 1.0), ("flow", 2, 3.0)],
)
def test_forward_repeats_the_sampler_bit_for_bit(lora_policy, tiny, make_request, schedule, references, guidance):
    sde = SdeSpec(schedule, 0.5, 1, 2)
    captions = ["the red circle rises", "blue square", "the green circle"]
    requests = [
        make_request(i, references=references, caption=c, guidance=guidance, sde=sde) for i, c in enumerate(captions)
    ]
    items = experiences(lora_policy, requests)
    learner = VdmPolicy.load(tiny, lora=LoraSection(rank=4, alpha=8.0))  # another process: nothing cached, its own copy
    learner.load_adapter_state(lora_policy.adapter_state())
    assert isinstance(learner, Trainable)
    out = learner.forward(learner.collate(items))
    assert torch.equal(out.logprobs.detach(), learner.rollout_logprobs(items))
    assert out.logprobs.requires_grad and out.logprobs.shape == (3, 2) and out.mask.all()
    assert out.mean.shape == (3, 2, 16, 3, 4, 4) and (out.std > 0).all()
    alone = learner.forward(learner.collate(items[:1])).logprobs.detach()
    assert torch.allclose(alone, out.logprobs.detach()[:1], atol=1e-5)  # another batch: float noise only


def test_windows_of_different_size_and_place_share_a_batch(policy, make_request):
    items = experiences(policy, [make_request(0, sde=SdeSpec("flow", 0.7, 0, 1))])
    items += experiences(policy, [make_request(1, sde=SdeSpec("flow", 0.7, 1, 2))])
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
    assert out.mask.tolist() == [[True, False], [True, True]]
    assert torch.allclose(out.logprobs, policy.rollout_logprobs(items), atol=1e-5)
    assert out.logprobs[0, 1] == 0
    other = experiences(policy, [make_request(2, sde=SdeSpec("dance", 0.3, 0, 1))])
    with pytest.raises(ValueError, match="must agree"):
        policy.collate(items + other)


def test_gradients_reach_the_adapter_only_and_lower_the_loss(lora_policy, make_request):
    items = experiences(lora_policy, [make_request(i, sde=SDE) for i in range(2)])
    trained = [p for p in lora_policy.module.parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n, p in lora_policy.module.named_parameters() if p.requires_grad)
    batch = lora_policy.collate(items)
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    before = lora_policy.forward(batch).logprobs
    (-before.sum()).backward()
    optimizer.step()
    with torch.no_grad():
        after = lora_policy.forward(batch).logprobs
    assert after.sum() > before.sum()  # the sampled steps have become likelier


def test_kl_to_the_disabled_adapter_is_the_closed_form(lora_policy, policy, make_request):
    items = experiences(lora_policy, [make_request(i, sde=SDE) for i in range(2)])
    batch = lora_policy.collate(items)
    with torch.no_grad():
        out = lora_policy.forward(batch)
        with lora_policy.reference():
            reference = lora_policy.forward(batch)
        base = policy.forward(policy.collate(items))
        again = lora_policy.forward(batch)
    assert torch.equal(reference.mean, base.mean) and torch.equal(reference.logprobs, base.logprobs)
    assert torch.equal(out.logprobs, again.logprobs)  # switched on again afterwards
    assert any(p.requires_grad for p in lora_policy.module.parameters())
    spread = out.std[..., None, None, None, None]
    expected = kl_divergence(Normal(out.mean, spread), Normal(reference.mean, spread)).flatten(2).mean(2)
    value = lora_policy.kl(out, reference)
    assert torch.allclose(value, expected, rtol=1e-4) and (value > 0).all()
    assert (lora_policy.kl(out, out) == 0).all()
    with pytest.raises(ValueError, match="no LoRA"), policy.reference():
        pass


def test_a_fresh_adapter_changes_nothing(tiny, policy, make_request):
    fresh = VdmPolicy.load(tiny, lora=LoraSection(rank=4, alpha=8.0))
    request = make_request(sde=SDE)
    assert np.array_equal(sample(fresh, [request])[0].frames, sample(policy, [request])[0].frames)
    adapted = {name.split(".lora_A")[0] for name, _ in fresh.module.named_parameters() if "lora_A" in name}
    ends = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v")
    ends += ("attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    assert adapted == {f"blocks.{i}.{end}" for i in range(2) for end in ends}


def test_export_loads_in_peft_and_in_diffusers(lora_policy, tiny, make_request, tmp_path):
    lora_policy.export(tmp_path)
    request = make_request(references=0)
    ours, _ = sample_latents(lora_policy, [request], (16, 3, 4, 4))
    base, _ = sample_latents(VdmPolicy.load(tiny), [request], (16, 3, 4, 4))
    assert (ours - base).abs().max() > 1e-2

    pipe = WanPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    theirs = pipe(
        request.caption,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(request.noise_seed),
        output_type="latent",
    ).frames
    assert (ours - theirs).abs().max() <= 1e-5

    stock = WanPipeline.from_pretrained(tiny).transformer
    adapted = PeftModel.from_pretrained(stock, str(tmp_path))
    x, t, text = torch.randn(1, 16, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with torch.no_grad():
        peft = adapted(hidden_states=x, timestep=t, encoder_hidden_states=text).sample
        own = lora_policy.module(hidden_states=x, timestep=t, encoder_hidden_states=text).sample
    assert torch.allclose(peft, own, atol=1e-6)

    again = VdmPolicy.load(tiny, adapter=tmp_path, lora=LoraSection(rank=4, alpha=8.0))
    assert torch.equal(sample_latents(again, [request], (16, 3, 4, 4))[0], ours)
    with pytest.raises(CheckpointError, match="set them equal"):
        VdmPolicy.load(tiny, adapter=tmp_path, lora=LoraSection(rank=8, alpha=8.0))


def test_adapters_that_cannot_be_loaded_say_why(lora_policy, tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json .*not found"):
        VdmPolicy.load(tiny, adapter=tmp_path)
    lora_policy.export(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(CheckpointError, match="rank"):
        VdmPolicy.load(tiny, adapter=tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="damaged"):
        VdmPolicy.load(tiny, adapter=tmp_path)


def test_full_weights_export_is_a_pipeline_folder(tiny, make_request, tmp_path):
    policy = VdmPolicy.load(tiny)
    assert all(p.requires_grad for p in policy.module.parameters())
    with torch.no_grad():
        policy.module.proj_out.bias += 0.1
    policy.export(tmp_path / "a")
    policy.export(tmp_path / "b", {name: tensor.clone() for name, tensor in policy.module.state_dict().items()})
    expected = sample(policy, [make_request()])[0].frames
    for name in ("a", "b"):
        WanPipeline.from_pretrained(tmp_path / name)
        assert np.array_equal(sample(VdmPolicy.load(tmp_path / name), [make_request()])[0].frames, expected)
    with pytest.raises(CheckpointError, match="overwrite"):
        policy.export(tiny)


def test_a_copied_module_may_stand_in(policy, make_request):
    """The learner swaps in a frozen copy as the reference where there is no adapter."""
    items = experiences(policy, [make_request(sde=SDE)])
    stand_in = VdmPolicy.load(policy.blueprint.folder)
    stand_in.module = copy.deepcopy(stand_in.module).requires_grad_(False)
    out = stand_in.forward(stand_in.collate(items))
    assert torch.equal(out.logprobs, stand_in.rollout_logprobs(items)) and not out.logprobs.requires_grad


@pytest.fixture
def mesh(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_policy_learns_the_same(load_adapted, mesh, make_request, dtype):
    """Several forwards per backward, guidance, checkpointing, and the reference pass first: what the learner may do."""
    plain = load_adapted()
    items = experiences(plain, [make_request(i, sde=SDE, guidance=2.0) for i in range(2)])
    sharded = load_adapted()
    shard(sharded.module, sharded.fsdp_units, mesh, dtype, checkpointing=True)
    batch = sharded.collate(items)
    with torch.no_grad(), sharded.reference():
        reference = sharded.forward(batch)
    outs = [plain.forward(plain.collate(items)), sharded.forward(batch)]
    for out in outs:
        out.logprobs.sum().backward()
    exact = dtype == torch.float32
    assert torch.allclose(outs[0].logprobs, outs[1].logprobs, atol=0 if exact else 1e-3)
    assert (sharded.kl(outs[1], reference) > 0).all()
    for one, other in zip(trainable_parameters(plain.module), trainable_parameters(sharded.module), strict=True):
        error = (one.grad - other.grad.full_tensor()).norm() / one.grad.norm()
        assert error < (1e-6 if exact else 0.2)


def clips(n: int):
    """n supervised items."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (11, 32, 32, 3), dtype=np.uint8) for _ in range(n)]
    return [(f[:2], caption, f[2:]) for f, caption in zip(frames, ["the red circle", "blue square"] * n)]


def test_sft_loss_is_the_flow_matching_error_on_target_latents(policy):
    batch, spec = clips(3), FlowMatchingSpec(caption_dropout=0.0)
    loss = policy.sft_loss(batch, generator=torch.Generator().manual_seed(5), spec=spec)
    generator = torch.Generator().manual_seed(5)
    draws = []
    for _ in batch:
        torch.rand((), generator=generator)
        time = torch.randn(1, generator=generator)
        draws.append((time, torch.randn((16, 3, 4, 4), generator=generator)))
    sigma = flow_sde.shift_sigma(torch.sigmoid(torch.cat([time for time, _ in draws])), 3.0)
    noise = torch.stack([noise for _, noise in draws])
    clean = policy.encode_targets([target for _, _, target in batch])
    noisy = torch.stack([(1 - s) * c + s * e for s, c, e in zip(sigma, clean, noise)])
    condition = policy.condition([c for _, c, _ in batch], [r for r, _, _ in batch], [1.0] * 3)
    expected = torch.nn.functional.mse_loss(policy.velocity(noisy, sigma, condition), noise - clean)
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-5) and loss.count == 3
    assert loss.metrics["loss"] == pytest.approx(loss.mean.item()) and 0 < loss.metrics["sigma_mean"] < 1


def test_dropped_captions_train_the_negative_branch(policy):
    batch = clips(2)
    dropped = FlowMatchingSpec(caption_dropout=1.0)
    losses = [
        policy.sft_loss(
            [(r, caption, t) for r, _, t in batch], generator=torch.Generator().manual_seed(1), spec=dropped
        )
        for caption in ("the red circle", "blue square")
    ]
    assert losses[0].total.item() == losses[1].total.item() and losses[0].metrics["caption_dropped"] == 1.0


def test_sft_learns_and_may_train_the_text_encoder(tiny):
    policy = VdmPolicy.load(tiny)
    encoder = policy.train_text_encoder()
    parameters = [*policy.module.parameters(), *encoder.parameters()]
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for step in range(8):
        loss = policy.sft_loss(clips(2), generator=torch.Generator().manual_seed(step % 2)).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])
    assert any(not torch.equal(before[name], p) for name, p in encoder.named_parameters())
    assert all(p.grad is None for p in policy.vae.parameters())
