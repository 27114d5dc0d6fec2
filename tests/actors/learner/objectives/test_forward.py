"""Forward-process objectives: the losses by hand and in their limits, and a learner of the tiny artist that takes them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.batches import plan_batch
from actors.learner.objectives.awm import Awm
from actors.learner.objectives.forward import square
from actors.learner.objectives.nft import Nft
from actors.learner.objectives.settings import AwmSection, NftSection, ObjectiveSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from actors.policy.lora import peft_names
from actors.policy.settings import LoraSection
from actors.records import RenderRequest, VdmExperience
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample, sample_latents
from actors.vdm.trajectories import noised
from actors.weights.transport import as_tensors
from cluster.errors import ConfigError, TrainingError
from pipeline.config import load_config
from pipeline.stages.groups import RolloutBatch
from pipeline.stages.stage2 import Stage2

pytestmark = pytest.mark.slow

SETTINGS = {"nft": NftSection(), "awm": AwmSection(weight=50.0)}


# --- the losses ------------------------------------------------------------------------------------------------------


def pair(seed: int = 0, rows: int = 3) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Two velocities near the target of a noised clip, (B, 2, 1, 2, 2), in double precision."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(rows, 2, 1, 2, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    clean, noise, sigma = draw(), draw(), torch.tensor([0.2, 0.5, 0.9])[:rows].double()
    level = sigma.view(-1, 1, 1, 1, 1)
    at = SimpleNamespace(clean=clean, sigma=sigma, noisy=(1 - level) * clean + level * noise, target=noise - clean)
    old = at.target + 0.3 * draw()
    return (old + 0.2 * draw()).requires_grad_(), old, at


def test_nft_by_hand() -> None:
    """One latent value: x0 = 1, eps = 3, sigma = 0.5, so x = 2 and v* = 2; v_old = 1, v = 2, beta = 0.5, A = A_max / 2.

    v+ = 1.5 gives x0 = 1.25, an error of 0.25; v- = 0.5 gives 1.75, an error of 0.75. An error's square over itself is the
    error, r = 0.75, and the loss (0.75 * 0.25 + 0.25 * 0.75) / 0.5.
    """
    one = lambda value: torch.full((1, 1, 1, 1, 1), value)  # noqa: E731
    at = SimpleNamespace(clean=one(1.0), sigma=torch.tensor([0.5]), noisy=one(2.0))
    settings = NftSection(beta=0.5, advantage_max=2.0)
    loss, figures = Nft(settings).losses(one(2.0), one(1.0), None, at, torch.tensor([1.0]))
    assert loss.tolist() == pytest.approx([0.75]) and figures["good"].tolist() == [0.75]
    far, _ = Nft(settings).losses(one(2.0), one(1.0), None, at, torch.tensor([-9.0]))  # beyond A_max: wholly bad
    assert far.tolist() == pytest.approx([0.75 / 0.5])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nft_of_a_wholly_good_or_bad_clip_is_one_branch(sign: float) -> None:
    """beta = 1 and A at the limit: the squared error of v itself, or of its mirror image at v_old."""
    v, old, at = pair()
    loss, _ = Nft(NftSection(beta=1.0, advantage_max=1.0)).losses(v, old, None, at, torch.full((3,), sign).double())
    reached = v if sign > 0 else 2 * old - v
    error = at.sigma.view(-1, 1, 1, 1, 1) * (reached - at.target)  # x - sigma v - x0
    torch.testing.assert_close(loss, square(error) / error.detach().abs().flatten(1).mean(dim=1))


def test_before_the_first_update_nft_follows_its_advantage() -> None:
    """At v = v_old the gradient is (2 r - 1) times that of the flow-matching error, whatever beta is."""
    _, old, at = pair()
    advantages = torch.tensor([1.0, 0.0, -0.5]).double()
    gradients = {}
    for beta in (0.1, 1.0):
        v = old.clone().requires_grad_()
        loss, _ = Nft(NftSection(beta=beta, advantage_max=1.0)).losses(v, old, None, at, advantages)
        (gradients[beta],) = torch.autograd.grad(loss.sum(), v)
    torch.testing.assert_close(gradients[0.1], gradients[1.0])
    v = old.clone().requires_grad_()
    error = at.sigma.view(-1, 1, 1, 1, 1) * (v - at.target)
    matching = square(error) / error.detach().abs().flatten(1).mean(dim=1)
    (plain,) = torch.autograd.grad(matching.sum(), v)
    torch.testing.assert_close(gradients[1.0], plain * advantages.view(-1, 1, 1, 1, 1))


def test_awm_is_ppo_on_flow_matching_losses() -> None:
    v, old, at = pair()
    advantages, weight = torch.tensor([2.0, -1.0, 1.0]).double(), 3.0
    log_ratio = weight * (square(old - at.target) - square(v.detach() - at.target))
    loss, figures = Awm(AwmSection(weight=weight, clip_low=9.0, clip_high=99.0)).losses(v, old, None, at, advantages)
    torch.testing.assert_close(loss, -torch.exp(log_ratio) * advantages)
    torch.testing.assert_close(figures["ratio"], torch.exp(log_ratio))
    assert not figures["clipped"].any()
    # At v = v_old: the gradient of A w l.
    fresh = old.clone().requires_grad_()
    loss, _ = Awm(AwmSection(weight=weight)).losses(fresh, old, None, at, advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), fresh)
    again = old.clone().requires_grad_()
    (expected,) = torch.autograd.grad((advantages * weight * square(again - at.target)).sum(), again)
    torch.testing.assert_close(gradient, expected)


def test_awm_cuts_what_leaves_the_clip_range_against_its_advantage() -> None:
    """l_old = 1 and l = 0: the ratio is e, far above 1.2. A good clip learns no more; a bad one does."""
    target = torch.zeros(2, 1, 1, 1, 1)
    at, old = SimpleNamespace(target=target), torch.ones(2, 1, 1, 1, 1)
    v = torch.full((2, 1, 1, 1, 1), 1e-3, requires_grad=True)
    loss, figures = Awm(AwmSection()).losses(v, old, None, at, torch.tensor([1.0, -1.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert figures["clipped"].tolist() == [1.0, 0.0] and gradient[0].item() == 0.0 != gradient[1].item()
    assert loss[0].item() == pytest.approx(-1.2)


# --- in the learner --------------------------------------------------------------------------------------------------


def spec_of(name: str, learning: ObjectiveSection | None = None, **changes) -> LearnerSpec:
    """A learner of the tiny artist."""
    values = {
        "kind": "vdm",
        "lora": LoraSection(rank=4, alpha=8.0),
        "optim": OptimSection(lr=1e-3),
        "objective": name,
        "learning": learning or SETTINGS[name],
        "seed": 5,
        "settings": LearnerSection(ranks=1),
    }
    return LearnerSpec(model_path="tiny", **(values | changes))


@pytest.fixture(scope="module")
def artist(tiny_vdm_dir: Path) -> VdmPolicy:
    """The tiny artist with an adapter whose B is not zero."""
    policy = VdmPolicy.load(tiny_vdm_dir, lora=LoraSection(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def rollout(artist: VdmPolicy) -> list[VdmExperience]:
    """Two groups of two clips by the ODE, one good and one bad each; guided, as a rollout may be."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    requests = [
        RenderRequest(f"s{g}", i, f"the {c} circle rises", frames, 9, 3, 2.0, noise_seed=10 * g + i, ends=True)
        for g, c in enumerate(("red", "blue"))
        for i in range(2)
    ]
    return [
        VdmExperience(c.sample_id, c.index, c.caption, frames, c.trajectory, (-1.0) ** c.index, c.condition)
        for c in sample(artist, requests)
        if c.trajectory is not None
    ]


@pytest.fixture
def trainer_of(artist: VdmPolicy, mesh: DeviceMesh) -> Callable[[LearnerSpec], Trainer]:
    def make(spec: LearnerSpec) -> Trainer:
        return Trainer(copy.deepcopy(artist), spec, mesh, torch.device("cpu"))

    return make


def plan(items: list[VdmExperience], micro: int = 16):
    (only,) = plan_batch(items, ranks=1, micro_batch=micro, updates=1)
    return only


def adapter(trainer: Trainer) -> dict[str, np.ndarray]:
    weights = trainer.weights()
    assert weights is not None
    return weights.tensors


def equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_a_rollout_hands_on_its_end_and_the_step_before(artist: VdmPolicy, rollout: list[VdmExperience]) -> None:
    path = rollout[0].trajectory
    assert path.latents.shape[0] == 2 and path.logprobs.shape == (0,) and path.sde.level == 0
    assert (path.sde.window_start, path.guidance) == (2, 2.0)
    plain = RenderRequest("s0", 0, rollout[0].caption, rollout[0].reference_frames, 9, 3, 2.0, noise_seed=0)
    assert sample(artist, [plain])[0].trajectory is None
    assert np.array_equal(sample(artist, [plain])[0].frames, sample(artist, [replace(plain, ends=True)])[0].frames)
    latents, _ = sample_latents(artist, [plain], check(artist, plain))
    torch.testing.assert_close(torch.from_numpy(path.latents[-1].copy()), latents[0], atol=1e-5, rtol=1e-5)


def test_noise_is_of_each_clips_own_seed(artist: VdmPolicy, rollout: list[VdmExperience]) -> None:
    batch = artist.collate(rollout)
    one, two = noised(batch, [1, 2, 3, 4], 3.0), noised(batch, [9, 2, 8, 7], 3.0)
    assert torch.equal(one.noisy[1], two.noisy[1]) and one.sigma[1] == two.sigma[1]
    assert not torch.equal(one.noise[0], two.noise[0]) and one.sigma[0] != two.sigma[0]
    assert one.condition.negative is None and batch.condition.negative is not None
    level = one.sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(one.noisy - level * one.target, one.clean)  # x - sigma v is x0
    assert torch.equal(one.clean, batch.after[-1])


@pytest.mark.parametrize("name", SETTINGS)
def test_several_updates_of_one_rollout_pull_good_clips_and_push_bad_ones(trainer_of, rollout, name: str) -> None:
    trainer = trainer_of(spec_of(name))

    def errors() -> Tensor:
        batch = trainer.policy.collate(rollout)
        with torch.no_grad():
            found = []
            for seed in range(8):
                at = trainer.policy.noised(batch, [100 * seed + i for i in range(len(rollout))])
                found.append(square(trainer.policy.velocity(at.noisy, at.sigma, at.condition) - at.target))
        return torch.stack(found).mean(dim=0)

    before = errors()
    report = trainer.update(plan(rollout), epochs=6)
    moved = errors() - before
    assert moved[0] < moved[1] and moved[2] < moved[3]  # the good clip of each group beside its bad one
    assert report.common["updates"] == 6 and report.sums["applied"] == pytest.approx(6)
    assert report.common["velocity_dev"] < 1e-4 and "ratio_max_dev" not in report.common
    assert report.sums["steps"] == 6 * len(rollout) and report.sums["velocity_gap"] > 0
    if name == "nft":
        assert report.sums["good"] / report.sums["steps"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cut_into_micro_batches_does_not_matter(trainer_of, rollout, name: str) -> None:
    grown = {}
    for micro in (1, 3, 16):
        trainer = trainer_of(spec_of(name, SETTINGS[name].model_copy(update={"kl_beta": 0.1})))
        trainer.update(plan(rollout, micro), epochs=2)
        grown[micro] = adapter(trainer)
    for one, two in itertools.pairwise(grown.values()):
        for key, value in one.items():
            np.testing.assert_allclose(value, two[key], atol=2e-5)


def test_the_distance_to_the_reference_holds_the_policy_back(trainer_of, rollout) -> None:
    """The adapter's B is not zero, so the policy starts away from its reference."""
    found = {}
    for beta in (0.0, 50.0):
        trainer = trainer_of(spec_of("nft", NftSection(kl_beta=beta, gate_every=1000)))  # one old rollout serves
        figures = [dict(trainer.update(plan(rollout), epochs=4).sums) for _ in range(3)]
        found[beta] = [f.get("kl", 0.0) for f in figures]
    assert found[0.0] == [0.0] * 3 and found[50.0][0] > found[50.0][2] > 0


def test_the_weights_that_sample_are_published_and_follow_slowly(trainer_of, rollout) -> None:
    at_once, slow = trainer_of(spec_of("nft")), trainer_of(spec_of("nft", NftSection(behaviour_decay=0.75)))
    start = adapter(slow)
    for trainer in (at_once, slow):
        trainer.update(plan(rollout), epochs=3)
    learnt = adapter(at_once)
    assert not equal(learnt, start)
    for key, value in adapter(slow).items():  # both learnt the same; the slow one publishes a quarter of the way
        np.testing.assert_allclose(value, 0.75 * start[key] + 0.25 * learnt[key], atol=1e-6)


@pytest.mark.parametrize("fault", ["stale weights", "a reference frame dropped"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_velocity_gate_trips(trainer_of, rollout, name: str, fault: str) -> None:
    trainer, items = trainer_of(spec_of(name)), rollout
    if fault == "stale weights":
        trainer.update(plan(items), epochs=4)
        trainer.optimizer.steps = 10  # where the gate is due again
    else:
        items = [
            replace(item, condition=replace(item.condition, references=item.condition.references[:, :1]))
            for item in items
        ]
    with pytest.raises(TrainingError, match="velocity gate"):
        trainer.update(plan(items))


def test_the_velocity_gate_wants_clips_of_the_weights_that_are_published(trainer_of, rollout, artist) -> None:
    """They follow slowly here, so those that are learnt are others: clips of the published ones pass, of the learnt ones do not."""
    trainer = trainer_of(spec_of("nft", NftSection(behaviour_decay=0.5, gate_every=1)))
    assert trainer.update(plan(rollout), epochs=4).common["velocity_dev"] < 1e-4
    published, sampler = trainer.weights(), copy.deepcopy(artist)
    assert published is not None
    requests = [
        RenderRequest(i.sample_id, i.index, i.caption, i.reference_frames, 9, 3, 2.0, noise_seed=k, ends=True)
        for k, i in enumerate(rollout)
    ]

    def drawn() -> list[VdmExperience]:
        clips = sample(sampler, requests)
        return [replace(i, trajectory=c.trajectory, condition=c.condition) for i, c in zip(rollout, clips, strict=True)]

    learnt = {name: p.detach() for name, p in trainer.policy.module.named_parameters() if p.requires_grad}
    sampler.load_adapter_state(
        peft_names({name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in learnt.items()})
    )
    with pytest.raises(TrainingError, match="velocity gate"):
        trainer.update(plan(drawn()))
    sampler.load_adapter_state(as_tensors(published))
    assert trainer.update(plan(drawn())).common["velocity_dev"] < 1e-4


def test_the_gate_is_looked_at_when_it_is_due(trainer_of, rollout) -> None:
    trainer = trainer_of(spec_of("nft", NftSection(gate_every=5)))
    trainer.update(plan(rollout), epochs=2)
    report = trainer.update(plan(rollout), epochs=2)  # steps 2 and 3: not due, so stale weights pass
    assert report.common["velocity_dev"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage2.objective=nft", "stage2.rollout.max_staleness=1"], "max_staleness: 0"),
        (["stage2.objective=awm", "training=all_in_one"], "two_stage"),
        (["stage2.objective=nft", "stage2.nft.beta=0"], "greater than 0"),
        (["stage2.objective=ppo"], "'grpo', 'nft' or 'awm'"),
        (["stage1.objective=nft"], "'grpo', 'gspo' or 'cispo'"),
        (["stage2.objective=nft", "stage2.nft.min_group=99"], "nft.min_group=99"),
        (["stage2.objective=nft", "stage2.nft.advantage_max=0"], "nft.advantage_max=0: .* greater than 0"),
        (["stage2.objective=nft", "stage2.nft.behaviour_decay=1"], "nft.behaviour_decay=1: .* less than 1"),
        (["stage2.objective=nft", "stage2.rollout.group_size=1"], "at least 2 trajectories"),
        (["stage2.objective=awm", "stage2.awm.weight=0"], "awm.weight=0: .* greater than 0"),
        (["stage2.ppo.beta=1"], "known keys: .*grpo, nft, awm"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("toy", overrides)


@pytest.mark.parametrize("keys", [("render.steps=2",), ("render.steps=1",), ("render.steps=6", "sde.level=0")])
def test_a_rollout_of_few_steps_is_enough(keys: tuple[str, ...]) -> None:
    """An SDE window needs room in the grid; an ODE's end does not, and the SDE's settings are not read."""
    overrides = ["stage2.objective=nft", "stage2.sde.window_range=null", *(f"stage2.{key}" for key in keys)]
    stage = Stage2(load_config("toy", overrides), None)  # type: ignore[arg-type]
    assert stage.window is None and "sde/window_start" not in stage.metrics(RolloutBatch((), (), ()), 0)
    with pytest.raises(ConfigError, match=r"window_size|level=0"):
        Stage2(load_config("toy", [*overrides, "stage2.objective=grpo"]), None)  # type: ignore[arg-type]
