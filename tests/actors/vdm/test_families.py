"""What every member of every family must do, on tiny random weights: nothing here knows which one it is."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from actors.architectures import architecture
from actors.failures import BadSampleError, Ok
from actors.learner.batches import plan_batch
from actors.learner.objectives.grpo import grpo_loss, normaliser
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.sharding import shard, unit_names
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from actors.policy.protocol import trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import EmbedRequest, EncodeRequest, RenderRequest, SdeSpec, VdmExperience
from actors.vdm.embed_worker import EmbedWorker
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample, sample_latents
from actors.vdm.settings import ConditioningSection
from actors.vdm.trajectories import Condition
from actors.vdm.worker import VdmWorker
from actors.weights.transport import as_tensors
from cluster.errors import CheckpointError
from tests.actors.vdm.pipelines import GIVEN, MEMBERS, build

LORA = LoraSection(rank=4, alpha=8.0)
SDE = SdeSpec("flow", 0.7, 1, 2)
CAPTIONS = ("the red circle rises", "blue square", "the green circle moves up")


@pytest.fixture(scope="module", params=MEMBERS)
def member(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(member: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(member, tmp_path_factory.mktemp("member"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> VdmPolicy:
    """The base pipeline; tests must not change its weights."""
    return VdmPolicy.load(folder)


def adapted(folder: Path, **options: Any) -> VdmPolicy:
    """The pipeline with an adapter whose B is not zero: the same one each time."""
    policy = VdmPolicy.load(folder, lora=LORA, **options)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


Ask = Callable[..., RenderRequest]


@pytest.fixture(scope="module")
def ask(member: str) -> Ask:
    """Requests as the member takes them, different in what is given."""
    given = GIVEN.get(member, 0)

    def make(index: int = 0, references: int = given or 2, **changes: Any) -> RenderRequest:
        frames = np.random.default_rng(5).integers(0, 256, (references, 32, 32, 3), dtype=np.uint8)
        fields = {"caption": CAPTIONS[index % 3], "num_frames": 9 - given, "steps": 4, "guidance": 1.0}
        return RenderRequest(
            "s", index, reference_frames=frames, sde_seed=index, **({"noise_seed": index} | fields | changes)
        )

    return make


def condition_of(policy: VdmPolicy, *requests: RenderRequest) -> Condition:
    return policy.condition(
        [r.caption for r in requests],
        [r.reference_frames for r in requests],
        [r.guidance for r in requests],
        requests[0].num_frames,
    )


def experiences(policy: VdmPolicy, requests: list[RenderRequest]) -> list[VdmExperience]:
    return [
        VdmExperience(c.sample_id, c.index, c.caption, r.reference_frames, c.trajectory, 1.0, c.condition)
        for c, r in zip(sample(policy, requests), requests, strict=True)
        if c.trajectory is not None
    ]


@pytest.mark.parametrize(("alone", "guidance"), [(False, 1.0), (True, 1.0), (False, 3.0)])
def test_before_the_first_update_the_ratio_is_exactly_one(
    member: str, folder: Path, ask: Ask, alone: bool, guidance: float
) -> None:
    """A learner of the transformer alone, with what the clips bring along, repeats the sampler bit for bit."""
    sampler = adapted(folder)
    requests = [ask(i, **({"references": 0} if alone else {}), guidance=guidance, sde=SDE) for i in range(3)]
    if alone and member in GIVEN:
        with pytest.raises(BadSampleError, match="reference_frames=0: this model begins with one given frame"):
            sample(sampler, requests)
        return
    items = experiences(sampler, requests)
    learner = VdmPolicy.load(folder, lora=LORA, components=("transformer",))
    learner.load_adapter_state(sampler.adapter_state())
    out = learner.forward(learner.collate(items))
    assert torch.equal(out.logprobs.detach(), learner.rollout_logprobs(items)) and out.mask.all()
    with learner.reference(), torch.no_grad():
        reference = learner.forward(learner.collate(items))
    assert (learner.kl(out, reference) > 0).all()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_policy_that_checkpoints_its_blocks_learns_the_same(folder: Path, ask: Ask, mesh: Any) -> None:
    """As the learner does it: the reference pass first, guidance, several forwards before the backward."""
    plain, sharded = adapted(folder), adapted(folder)
    items = experiences(plain, [ask(i, sde=SDE, guidance=2.0) for i in range(2)])
    shard(sharded.module, sharded.fsdp_units, mesh, torch.float32, checkpointing=True)
    batch = sharded.collate(items)
    with torch.no_grad(), sharded.reference():
        reference = sharded.forward(batch)
    outs = [plain.forward(plain.collate(items)), sharded.forward(batch)]
    for out in outs:
        out.logprobs.sum().backward()
    assert torch.equal(outs[0].logprobs, outs[1].logprobs) and (sharded.kl(outs[1], reference) > 0).all()
    for one, other in zip(trainable_parameters(plain.module), trainable_parameters(sharded.module), strict=True):
        assert (one.grad - other.grad.full_tensor()).norm() <= 1e-6 * one.grad.norm()  # type: ignore[union-attr]


def test_what_a_learner_has_learnt_reaches_the_sampler_and_the_export(
    folder: Path, ask: Ask, mesh: Any, tmp_path: Path
) -> None:
    """Worker, trainer and weights as a step of stage 2 uses them, in one process: draw, learn, publish, draw again."""
    worker = VdmWorker("vdm-0", str(folder))
    worker.setup()
    frozen, requests = worker.weights_hash(), [ask(i, noise_seed=1, sde=SDE) for i in range(4)]
    clips = [outcome.value for outcome in worker.process(requests) if isinstance(outcome, Ok)]
    items = [
        VdmExperience("s", c.index, c.caption, r.reference_frames, c.trajectory, (-1.0) ** c.index, c.condition)
        for c, r in zip(clips, requests, strict=True)
    ]
    spec = LearnerSpec(
        kind="vdm",
        model_path=str(folder),
        settings=LearnerSection(ranks=1),
        lora=LORA,
        optim=OptimSection(lr=1e-2),
        learning=GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.004, loss_norm="sequence", kl_estimator="closed"),
    )
    learner = VdmPolicy.load(folder, lora=LORA, components=("transformer",))
    trainer = Trainer(learner, spec, mesh, torch.device("cpu"))
    report = trainer.update(plan_batch(items, ranks=1, micro_batch=4, updates=1)[0])
    assert report.common["ratio_max_dev"] == 0.0 and report.maxima["logp_diff_max"] == 0.0
    weights = trainer.weights()
    assert weights is not None and report.common["grad_norm"] > 0
    worker.policy.put_adapter(as_tensors(weights), weights.adapter_config, "the published weights")
    assert worker.weights_hash() == frozen
    trainer.export(str(tmp_path / "adapter"))
    again = VdmPolicy.load(folder, adapter=tmp_path / "adapter")
    shape, plain = check(again, requests[0]), VdmPolicy.load(folder)
    drawn, served, before = (sample_latents(p, requests, shape)[0] for p in (again, worker.policy, plain))
    assert torch.equal(drawn, served) and not torch.equal(drawn, before)


def test_a_samplers_hash_is_of_every_frozen_model(folder: Path) -> None:
    worker = VdmWorker("vdm-0", str(folder))
    worker.setup()
    hashes = [worker.weights_hash()]
    for model in worker.policy.frozen_parts:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        hashes.append(worker.weights_hash())
    assert len(set(hashes)) == len(worker.policy.blueprint.row.classes)  # the transformer's place is that of the first
    assert {"vae_encoder", "vae_decoder", *worker.policy.blueprint.row.classes} - {"vae"} == set(worker.held())


def test_one_update_raises_the_reward(folder: Path, ask: Ask) -> None:
    """The reward is the mean of the final latents: after one step of GRPO, clips of the same noise have more of it."""
    policy = adapted(folder)
    requests = [ask(i, noise_seed=0, sde=SdeSpec("flow", 0.7, 0, 3), caption=CAPTIONS[0]) for i in range(8)]
    shape = check(policy, requests[0])

    def rewards() -> torch.Tensor:
        return sample_latents(policy, requests, shape)[0].flatten(1).mean(dim=1)

    before = rewards()
    advantages = (before - before.mean()) / before.std()
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    out = policy.forward(policy.collate(experiences(policy, requests)))
    loss, _ = grpo_loss(
        out.logprobs,
        out.logprobs.detach(),
        advantages,
        out.mask,
        clip_low=1e-3,
        clip_high=1e-3,
        loss_norm="sequence",
        normaliser=normaliser(out.mask, "sequence"),
    )
    loss.backward()
    optimizer.step()
    assert rewards().mean() > before.mean()


def test_an_exported_adapter_and_a_whole_model_load_in_diffusers(
    member: str, folder: Path, ask: Ask, tmp_path: Path
) -> None:
    policy = adapted(folder)
    policy.export(tmp_path / "adapter")
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.load_lora_weights(str(tmp_path / "adapter"), weight_name="pytorch_lora_weights.safetensors")
    request = ask(references=GIVEN.get(member, 0))
    x = torch.randn(1, *check(policy, request), generator=torch.Generator().manual_seed(0))
    sigma, condition = torch.tensor([0.5]), condition_of(policy, request)
    ours = policy.velocity(x, sigma, condition)
    stock = VdmPolicy.load(folder)
    stock.module = pipe.transformer
    stock.family.prepare(pipe.transformer)
    assert (stock.velocity(x, sigma, condition) - ours).abs().max() <= 1e-5
    assert (VdmPolicy.load(folder).velocity(x, sigma, condition) - ours).abs().max() > 1e-3
    again = VdmPolicy.load(folder, adapter=tmp_path / "adapter", lora=LORA)
    assert torch.equal(again.velocity(x, sigma, condition), ours)
    whole = VdmPolicy.load(folder)
    with torch.no_grad():
        whole.module.proj_out.bias += 0.1
    whole.export(tmp_path / "whole", {name: tensor.clone() for name, tensor in whole.module.state_dict().items()})
    exported = getattr(diffusers, kind).from_pretrained(tmp_path / "whole")
    assert all(getattr(exported, part) is not None for part in policy.blueprint.row.classes)
    loaded = VdmPolicy.load(tmp_path / "whole")
    assert torch.equal(loaded.velocity(x, sigma, condition), whole.velocity(x, sigma, condition))


def test_what_an_embed_worker_makes_is_bitwise_what_a_sampler_makes(folder: Path, policy: VdmPolicy, ask: Ask) -> None:
    worker, request = EmbedWorker("embed-0", str(folder)), ask()
    worker.setup()
    frames = EncodeRequest("s", request.reference_frames, request.num_frames)
    text, found = (
        answer.value for answer in worker.process([EmbedRequest(request.caption), frames]) if isinstance(answer, Ok)
    )
    made = policy.encode(request.caption, request.reference_frames, 1.0, request.num_frames)
    assert made.references is not None and text.max_tokens == made.max_tokens
    assert np.array_equal(text.rows, made.text.numpy()) and np.array_equal(found.latents, made.references.numpy())
    assert (found.image is None) == (made.image is None) == ("image_encoder" not in worker.held())
    assert made.image is None or np.array_equal(found.image, made.image.numpy())
    assert found.nbytes == sum(array.nbytes for array in (found.latents, found.image) if array is not None)
    # Every model that stands before the transformer is in the proof that it stays as it is, and can rest.
    frozen = set(policy.blueprint.row.classes) - {"transformer"}
    for part in frozen:
        hashed = worker.weights_hash()
        parameter = next(worker._models()[part].parameters())
        with torch.no_grad():
            parameter += 1
        assert worker.weights_hash() != hashed, part
    assert len(VdmPolicy.load(folder).frozen_parts) == len(frozen)


def test_a_caption_does_not_depend_on_its_batch(policy: VdmPolicy) -> None:
    embedder = policy.embedder
    assert embedder is not None
    together, alone = embedder(CAPTIONS), embedder(CAPTIONS[1:2])
    assert torch.equal(together.rows[1], alone.rows[0]) and torch.equal(together.mask[1], alone.mask[0])
    embedder.train(True)  # the batch that a trained encoder sees at once
    try:
        batch = embedder(CAPTIONS)
    finally:
        embedder.train(False)
    assert torch.equal(batch.mask, together.mask) and (batch.rows - together.rows).abs().max() <= 1e-5


@pytest.mark.parametrize("time", ["zero", "shared"])
def test_references_are_seen_and_keep_the_time_they_are_given(member: str, folder: Path, ask: Ask, time: str) -> None:
    policy = VdmPolicy.load(folder, conditioning=ConditioningSection(time=time))
    request = ask()
    x = torch.randn(2, *check(policy, request), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.5, 0.9])
    inverted = replace(request, reference_frames=255 - request.reference_frames)
    condition = condition_of(policy, request, inverted)
    seen: list[torch.Tensor] = []
    hook = policy.module.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    v = policy.velocity(x, sigma, condition)
    hook.remove()
    (times,) = seen
    target = sigma[:, None] * 1000
    if time == "shared" or member in GIVEN:  # what is given stands in channels: no token is its own
        assert torch.equal(times, target[:, 0])
    else:
        clean = (times == 0).sum(dim=1)
        assert clean.tolist() == [times.shape[1] * 2 // (2 + x.shape[2])] * 2
        assert all(
            bool((row[: clean[0]] == 0).all()) and bool((row[clean[0] :] == t).all()) for row, t in zip(times, target)
        )
    other = policy.velocity(x, sigma, condition_of(policy, request, request))
    assert torch.allclose(v[0], other[0], atol=1e-5) and (v[1] - other[1]).abs().max() > 1e-3


def test_two_times_embedded_once_are_the_same_and_a_copy_keeps_them(folder: Path, ask: Ask) -> None:
    request = ask()
    velocities = []
    for shared, copied in ((True, False), (False, False), (True, True)):
        policy = VdmPolicy.load(folder, shared_times=shared)
        if copied:
            policy.module = copy.deepcopy(policy.module)
        x = torch.randn(1, *check(policy, request), generator=torch.Generator().manual_seed(0))
        condition = condition_of(policy, request)
        velocities.append(policy.velocity(x, torch.tensor([0.7]), condition))
    # The rows' products may be summed in another order where there are two of them instead of a clip's tokens, or where the weights
    # lie elsewhere in memory.
    for other in velocities[1:]:
        assert (other - velocities[0]).abs().max() <= 1e-5


def test_times_are_exact_however_the_inputs_were_cast(folder: Path, policy: VdmPolicy, ask: Ask) -> None:
    """FSDP's mixed precision casts what goes into the module: 999.5 would be 1000 in bfloat16."""
    request, seen = ask(), []
    other = VdmPolicy.load(folder)

    def cast(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        for name in ("timestep", "video_coords"):
            if name in kwargs and isinstance(kwargs[name], torch.Tensor):
                seen.append(name)
                kwargs[name] = kwargs[name].to(torch.bfloat16)
        return args, kwargs

    other.module.register_forward_pre_hook(cast, with_kwargs=True)
    x = torch.randn(1, *check(policy, request), generator=torch.Generator().manual_seed(0))
    condition = condition_of(policy, request)
    pair = [p.velocity(x, torch.tensor([0.9995]), condition) for p in (policy, other)]
    assert "timestep" in seen and torch.equal(*pair)


def test_equal_latents_are_decoded_to_equal_frames(policy: VdmPolicy, ask: Ask) -> None:
    state = torch.get_rng_state()
    latents = torch.randn(2, *check(policy, ask()), generator=torch.Generator().manual_seed(0))
    first = policy.decode(latents)
    assert first.shape == (2, ask().num_frames, 32, 32, 3) and np.array_equal(first, policy.decode(latents))
    assert np.abs(policy.decode(latents[:1]).astype(int) - first[:1]).max() <= 1  # another batch: float noise only
    assert torch.equal(torch.get_rng_state(), state)


def test_frames_of_which_the_vae_would_drop_some_are_refused(member: str, policy: VdmPolicy, ask: Ask) -> None:
    chunk = policy.geometry.chunk
    fitting = f"first 1 of them the input's, .*use {chunk}$" if member in GIVEN else f"use 1 or {1 + chunk}"
    with pytest.raises(BadSampleError, match=f"takes {chunk}k\\+1 frames.*{fitting}"):
        check(policy, ask(num_frames=3))
    wide = np.zeros((9, 32, 33, 3), np.uint8)
    with pytest.raises(BadSampleError, match="width=33 is not a multiple"):
        policy.encode_targets([wide[: ask().num_frames]], [wide[: GIVEN.get(member, 0)]])
    if member in GIVEN:
        return
    clip = VdmPolicy.load(policy.blueprint.folder, conditioning=ConditioningSection(references="clip", take=2))
    with pytest.raises(BadSampleError, match=f"clip of 7 frames .*{chunk}k\\+1"):
        clip.encode_references(np.zeros((7, 32, 32, 3), np.uint8))
    assert clip.encode_references(np.zeros((9, 32, 32, 3), np.uint8)).shape[1] == 2


def test_blocks_and_the_default_adapter_are_what_the_plan_counts(folder: Path) -> None:
    policy, model = VdmPolicy.load(folder, lora=LORA), architecture(folder, "vdm")
    assert len(unit_names(policy.module, policy.fsdp_units)) == model.shapes.layers
    trained = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    assert trained == model.shapes.lora_parameters(4)
    assert sum(p.numel() for p in VdmPolicy.load(folder).module.parameters()) == model.parameters("transformer")


@pytest.mark.parametrize("change", ["channels", "class"])
def test_a_pipeline_that_cannot_be_used_says_why(folder: Path, tmp_path: Path, change: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    if change == "class":
        edit(other / "model_index.json", lambda c: c.update(_class_name="CogVideoXPipeline"))
        reason = "is of a CogVideoXPipeline; the vdm must be one of WanPipeline, .*it predicts v"
    else:
        edit(other / "transformer" / "config.json", lambda c: c.update(in_channels=99))
        reason = "takes 99 latent channels"
    for load in (lambda: VdmPolicy.load(other), lambda: architecture(other, "vdm")):
        with pytest.raises(CheckpointError, match=reason):
            load()


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
