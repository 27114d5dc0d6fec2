"""Ranks that share the tokens of a clip learn what one rank learns: velocities, gradients, updates, figures, resumption.

The reference is the unsharded artist in this process, or one rank. Each rank is the learner's own in another process, and joins its
peers by gloo; Ray only carries calls to it. Clips have two reference frames of time 0 before five noisy latent frames, 28 tokens, and
are guided, unless a test says otherwise.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import attention_backend
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.batches import plan_batch
from actors.learner.group import merge_reports
from actors.learner.objectives.settings import GrpoSection, NftSection
from actors.learner.rank import LearnerRank
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.sharding import whole
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from actors.policy.protocol import trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import RenderRequest, SdeSpec, VdmExperience
from actors.vdm.context_parallel import require_shareable
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.settings import ConditioningSection
from cluster.errors import ConfigError
from tests.actors.learner.toy_policy import ToyPolicy, changed

pytestmark = pytest.mark.slow

LORA = LoraSection(rank=4, alpha=8.0)
FULL: dict[str, Any] = {"lora": None, "adapter_path": None}
SHARED = {"ranks": 2, "context_parallel": 2}
Batch = list[VdmExperience]


Processes = Sequence[ProcessPoolExecutor]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """A process for each of four ranks, forked from one that has imported everything.

    A process keeps its rank from test to test: torch remembers where on a mesh it stands, and a shard is saved by that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in range(4)]


def clips(artist: VdmPolicy, groups: int, references: int = 2, side: int = 32, ends: bool = False) -> Batch:
    """Groups of two guided clips with opposite advantages: two learnt SDE steps, or where an ODE ends."""
    given = artist.geometry.given
    frames = np.random.default_rng(0).integers(0, 256, (given or references, side, side, 3)).astype(np.uint8)
    how: dict[str, Any] = {"ends": True} if ends else {"sde": SdeSpec("flow", 0.7, 0, 2)}
    requests = [
        RenderRequest(f"s{g}", i, f"the {colour} circle rises", frames, 9 - given, 3, 2.0, noise_seed=10 * g + i, **how)
        for g, colour in enumerate(("red", "blue", "green")[:groups])
        for i in range(2)
    ]
    return [
        VdmExperience(c.sample_id, c.index, c.caption, frames, c.trajectory, (-1.0) ** c.index, c.condition)
        for c in sample(artist, requests)
        if c.trajectory is not None
    ]


@pytest.fixture(scope="module")
def spec(tiny_vdm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LearnerSpec:
    """A learner of the tiny artist from an adapter whose B is not 0: where it is, A has no gradient."""
    policy, generator = VdmPolicy.load(tiny_vdm_dir, lora=LORA), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("adapter")
    policy.export(folder)
    return LearnerSpec(
        kind="vdm",
        model_path=str(tiny_vdm_dir),
        adapter_path=str(folder),
        lora=LORA,
        settings=LearnerSection(ranks=1, step_timeout_s=120.0),
        optim=OptimSection(lr=1e-4),
        policy_kwargs={"components": ("transformer",)},
    )


@pytest.fixture(scope="module")
def artist(spec: LearnerSpec) -> VdmPolicy:
    """What samples: the learner's weights before any update."""
    return VdmPolicy.load(spec.model_path, adapter=spec.adapter_path)


def on_ranks(processes: Processes, work: Callable[..., Any], spec: LearnerSpec, *arguments: Any) -> list[Any]:
    """Return what ``work`` returns on each rank of the group of ``spec``."""
    address = LearnerRank(spec, 0).pick_address()
    ranks = enumerate(processes[: spec.settings.ranks])
    calls = [process.submit(work, spec, rank, address, *arguments) for rank, process in ranks]
    return [call.result(timeout=300) for call in calls]


@contextmanager
def joined(spec: LearnerSpec, rank: int, address: str) -> Iterator[tuple[LearnerRank, Trainer]]:
    learner = LearnerRank(spec, rank)
    try:
        learner.setup(address)
        assert learner.trainer is not None
        yield learner, learner.trainer
    finally:
        learner.leave()


def derivative(policy: VdmPolicy, items: Batch) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Return the velocity of the first learnt step, and put the gradient of the summed log-probabilities into the parameters."""
    batch = policy.collate(items)
    with torch.no_grad():
        velocity = policy.velocity(batch.before[0], batch.sigmas[0][0], batch.condition)
    policy.forward(batch).logprobs.sum().backward()
    found = {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}
    return velocity.numpy(), {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()}


def derivatives(spec: LearnerSpec, rank: int, address: str, items: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Be one rank: return what :func:`derivative` does, the gradients summed over ranks, which FSDP2 averages."""
    with joined(spec, rank, address) as (_, trainer):
        velocity, gradients = derivative(trainer.policy, items)  # type: ignore[arg-type]
        return velocity, {name: whole(gradient).numpy() * trainer.world for name, gradient in gradients.items()}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # changes of the group, of its settings, of the policy's options
    "LoRA": ({}, {}, {}),
    "recomputed activations, each token's time embedded": (
        {},
        {"activation_checkpointing": True},
        {"shared_times": False},
    ),
    "full weights, one time for all tokens": (FULL, {}, {"conditioning": ConditioningSection(time="shared")}),
    "full weights of LTX, whose captions have a mask": (FULL, {}, {}),
    "full weights of Wan image to video, whose image no rank shares": (FULL, {}, {}),
}
MEMBERS = {"LTX": "ltx condition", "image to video": "wan i2v"}
"""What is in a case's name → which other artist it is of."""


@pytest.mark.parametrize("case", CASES)
def test_velocities_and_gradients_of_two_ranks_are_those_of_one_process(
    processes: Processes, spec: LearnerSpec, case: str, tmp_path: Path
) -> None:
    group, settings, options = CASES[case]
    for member in (member for words, member in MEMBERS.items() if words in case):
        from tests.actors.vdm.pipelines import build  # seconds of imports that no rank needs

        spec = replace(spec, model_path=str(build(member, tmp_path)))
    spec = replace(spec, **group, policy_kwargs=spec.policy_kwargs | options)
    plain = VdmPolicy.load(spec.model_path, adapter=spec.adapter_path, **options)
    items = clips(plain, 2, side=64 if "LTX" in case else 32)
    velocity, gradients = derivative(plain, items)
    assert len(gradients) == len(trainable_parameters(plain.module)) and len(items) == 4
    for found, summed in on_ranks(processes, derivatives, changed(spec, **SHARED, **settings), items):
        np.testing.assert_allclose(found, velocity, rtol=0, atol=1e-5)
        assert summed.keys() == gradients.keys()
        for name, expected in gradients.items():
            scale = float(expected.abs().max())
            assert scale > 0, name
            np.testing.assert_allclose(summed[name], expected, rtol=0, atol=1e-5 * scale, err_msg=name)


def updates(
    spec: LearnerSpec, rank: int, address: str, batches: Sequence[Batch], restore: str, save: str
) -> tuple[dict[str, np.ndarray] | None, list[Any]]:
    """Be one rank for an update of each of ``batches``, from ``restore`` where given; ``save`` after the first."""
    sharers, reports = spec.settings.sharers(spec.kind), []
    with joined(spec, rank, address) as (learner, trainer):
        if restore:
            learner.restore(restore)
        for k, batch in enumerate(batches):
            plans = plan_batch(batch, ranks=trainer.world // sharers, micro_batch=2, updates=1)
            reports.append(learner.update(plans[rank // sharers], 1)[0])
            if save and k == 0:
                learner.save(save)
        weights, _ = learner.publish(False)
        return (None if weights is None else dict(weights.tensors)), reports


def learnt(
    processes: Processes, spec: LearnerSpec, batches: Sequence[Batch], restore: str = "", save: str = ""
) -> tuple[Mapping[str, np.ndarray], list[dict[str, float]]]:
    """Return the weights that a group learns from ``batches``, and each update's metrics, merged as the group does."""
    answers = on_ranks(processes, updates, spec, batches, restore, save)
    tensors, sharers = answers[0][0], spec.settings.sharers(spec.kind)
    assert tensors is not None and not any(weights for weights, _ in answers[1:])
    reports = [reports for _, reports in answers[::sharers]]
    return tensors, [merge_reports([of[k] for of in reports]) for k in range(len(batches))]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "full weights, KL to a frozen copy": FULL | {"learning": GrpoSection(kl_beta=0.05)},
    "clips noised anew": {"objective": "nft", "learning": NftSection()},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_updates_and_figures_of_two_ranks_are_those_of_one(
    processes: Processes, spec: LearnerSpec, artist: VdmPolicy, objective: str
) -> None:
    spec = replace(spec, **OBJECTIVES[objective])
    batches = [clips(artist, 2, ends=spec.objective == "nft")] * 2
    expected, figures = learnt(processes, spec, batches)
    found, others = learnt(processes, changed(spec, **SHARED), batches)
    assert_same(found, expected)
    for one, other in zip(figures, others, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    start = artist.adapter_state() if spec.lora else VdmPolicy.load(spec.model_path).module.state_dict()
    moved = max(float(np.abs(expected[name] - start[name].numpy()).max()) for name in expected)
    assert moved > 1e-4, "it did learn"


def test_groups_that_share_clips_learn_beside_each_other_and_one_of_them_pads(
    processes: Processes, spec: LearnerSpec, artist: VdmPolicy
) -> None:
    batches = [clips(artist, 2)[:3], clips(artist, 1)[:1]]
    expected, figures = learnt(processes, spec, batches)
    found, others = learnt(processes, changed(spec, ranks=4, context_parallel=2), batches)
    assert_same(found, expected)
    for one, other in zip(figures, others, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_a_resumed_group_goes_on_bit_for_bit(
    processes: Processes, spec: LearnerSpec, artist: VdmPolicy, tmp_path: Path
) -> None:
    spec, batch, state = changed(spec, **SHARED), clips(artist, 1), str(tmp_path / "state")
    through, _ = learnt(processes, spec, [batch, batch], save=state)
    resumed, _ = learnt(processes, spec, [batch], restore=state)
    assert through.keys() == resumed.keys()
    assert all(np.array_equal(through[name], resumed[name]) for name in through)


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


# --- refusals


def refused(spec: LearnerSpec, rank: int, address: str, items: Batch) -> str:
    """Be one rank: return what it says of a batch that cannot be shared."""
    with joined(spec, rank, address) as (_, trainer), pytest.raises(ConfigError) as told:
        trainer.policy.forward(trainer.policy.collate(items))
    return str(told.value)


def test_a_clip_whose_tokens_do_not_divide_is_refused_on_all_ranks(
    processes: Processes, spec: LearnerSpec, artist: VdmPolicy
) -> None:
    odd = clips(artist, 1, references=0, side=16)  # five latent frames of one patch
    for told in on_ranks(processes, refused, changed(spec, **SHARED), odd):
        assert told == "learner.context_parallel=2 must divide a clip's tokens (5): use one of 1, 5"


def test_ranks_must_make_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"context_parallel=2 must divide ranks=3"):
        LearnerSection(ranks=3, context_parallel=2)
    section = LearnerSection(ranks=4, context_parallel=2)
    assert section.sharers("vdm") == 2 and section.sharers("vlm") == 1


REFUSALS: dict[str, tuple[Callable[[VdmPolicy], nn.Module], int, str]] = {
    "heads": (lambda artist: artist.module, 3, r"must divide the artist's attention heads \(4\): use one of 1, 2, 4"),
    "no plan": (lambda artist: artist.module.blocks[0], 2, "the artist's WanTransformerBlock has no plan"),  # type: ignore[index, union-attr]
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_transformer_that_cannot_be_shared_is_refused(artist: VdmPolicy, case: str) -> None:
    module, count, message = REFUSALS[case]
    with pytest.raises(ConfigError, match=message):
        require_shareable(module(artist), count)


def test_an_attention_that_would_stay_within_a_ranks_tokens_is_refused(artist: VdmPolicy) -> None:
    with attention_backend("flex"), pytest.raises(ConfigError, match="attention 'flex' cannot be shared"):
        require_shareable(artist.module, 2)


def test_a_policy_that_shares_nothing_is_refused(mesh: DeviceMesh, spec: LearnerSpec) -> None:
    with pytest.raises(ConfigError, match="context_parallel=2: ToyPolicy cannot share"):
        Trainer(ToyPolicy.load("3"), replace(changed(spec, **SHARED), **FULL), mesh, torch.device("cpu"))
