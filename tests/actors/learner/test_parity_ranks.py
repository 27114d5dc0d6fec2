"""A learner makes one update, however the batch is cut: 1, 2 or 3 ranks, uneven shards, one batch or k micro-batches.

The reference is the unsharded policy, the loss as the papers write it, and torch's AdamW, in this process. Each rank
is the learner's own in another process, and joins its peers by gloo; Ray only carries calls to it (``test_group_ray``).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.learner.batches import RankPlan, plan_batch, split_groups
from actors.learner.objectives.settings import GrpoSection
from actors.learner.rank import LearnerRank
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.spec import LearnerSpec
from actors.policy.lora import peft_names
from actors.policy.protocol import trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import VlmExperience, Weights
from tests.actors.learner.toy_policy import ToyPolicy, changed, experiences

pytestmark = pytest.mark.slow

SPEC = LearnerSpec(
    kind="tests.actors.learner.toy_policy:ToyPolicy",
    model_path="3",
    settings=LearnerSection(ranks=1, micro_batch=32, step_timeout_s=60.0),
    optim=OptimSection(lr=1e-2, max_grad_norm=0.5),
)
LORA = LoraSection(rank=2, alpha=8.0)
CASES = {
    "token, KL, LoRA": replace(SPEC, lora=LORA, learning=GrpoSection(kl_beta=0.05, clip_high=0.28)),
    "sequence, importance sampling, KL, full weights": replace(
        SPEC,
        learning=GrpoSection(
            loss_norm="sequence", old_logprobs="rollout", importance_cap=1.2, kl_beta=0.05, clip_low=0.01
        ),
    ),
    "constant, full weights": replace(SPEC, learning=GrpoSection(loss_norm="constant", clip_high=0.01), longest=9),
}
SHARDINGS = {
    "1 rank, one batch": (1, 32),
    "1 rank, accumulation of single items": (1, 1),
    "2 ranks, uneven": (2, 32),
    "3 ranks, uneven": (3, 32),
    "3 ranks, uneven, accumulation": (3, 2),
}
BATCHES = [(experiences(4, 4, 0)[:-3], 2), (experiences(1, 2, 7), 1)]
"""(items, optimizer steps): 13 items of uneven groups in two steps, then 2 items, so that a third rank only pads."""


def journey(spec: LearnerSpec, rank: int, address: str, plans: list[RankPlan]) -> Weights | None:
    """Be one rank for all ``BATCHES``; runs in a process of its own."""
    learner = LearnerRank(spec, rank)
    learner.setup(address)
    for plan in plans:
        learner.update(plan, 1)
    weights, _ = learner.publish(False)
    learner.leave()
    return weights


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Three processes, forked from one that has imported everything: a rank that waits for its peers keeps its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        yield pool


def trained_weights(processes: ProcessPoolExecutor, spec: LearnerSpec) -> dict[str, np.ndarray]:
    plans = [
        plan_batch(i, ranks=spec.settings.ranks, micro_batch=spec.settings.micro_batch, updates=u) for i, u in BATCHES
    ]
    address = LearnerRank(spec, 0).pick_address()
    calls = [
        processes.submit(journey, spec, rank, address, [plan[rank] for plan in plans])
        for rank in range(spec.settings.ranks)
    ]
    weights = [call.result(timeout=120) for call in calls]
    assert weights[0] is not None and not any(weights[1:])
    return weights[0].tensors


def surrogate(new: Tensor, old: Tensor, ref: Tensor, sampled: Tensor, advantage: float, grpo: GrpoSection) -> Tensor:
    """Return one completion's loss per token, (T,), as the papers write it."""
    ratio = torch.exp(new - old)
    bounded = torch.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
    loss = -torch.min(ratio * advantage, bounded * advantage)
    if grpo.old_logprobs == "rollout":
        loss = loss * torch.exp(old - sampled).clamp(max=grpo.importance_cap)
    return loss + grpo.kl_beta * (torch.exp(ref - new) - (ref - new) - 1)


def logprobs(policy: ToyPolicy, item: VlmExperience) -> Tensor:
    return policy.forward(policy.collate([item])).logprobs[0]


def engine(item: VlmExperience) -> Tensor:
    return torch.tensor(item.rollout_logprobs)


def plain_updates(spec: LearnerSpec) -> dict[str, Tensor]:
    """Return all parameters after the same updates in plain torch: one policy, one batch, item by item."""
    policy, base = (ToyPolicy.load(spec.model_path, lora=spec.lora) for _ in range(2))
    grpo, parameters = spec.learning, trainable_parameters(policy.module)
    optimizer = torch.optim.AdamW(parameters, lr=spec.optim.lr, betas=spec.optim.betas, weight_decay=0.0)
    for items, updates in BATCHES:
        with torch.no_grad():
            old = {id(i): logprobs(policy, i) for i in items}
            ref = {id(i): logprobs(base, i) for i in items}
        for part in split_groups(items, updates):
            terms = [surrogate(logprobs(policy, i), old[id(i)], ref[id(i)], engine(i), i.advantage, grpo) for i in part]
            if grpo.loss_norm == "sequence":  # type: ignore[attr-defined]
                loss = torch.stack([t.mean() for t in terms]).mean()
            else:
                tokens = torch.cat(terms)
                loss = tokens.sum() / (len(tokens) if grpo.loss_norm == "token" else len(part) * spec.longest)  # type: ignore[attr-defined]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, spec.optim.max_grad_norm)
            optimizer.step()
    return dict(policy.module.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_1_2_and_3_ranks_and_accumulation_make_the_update_of_plain_torch(
    processes: ProcessPoolExecutor, case: str
) -> None:
    spec = CASES[case]
    named = peft_names if spec.lora else dict
    expected = named(plain_updates(spec))
    start = named(ToyPolicy.load(spec.model_path, lora=spec.lora).module.state_dict())
    assert max(float((expected[name] - start[name]).abs().max()) for name in expected) > 1e-2, "it did learn"
    for sharding, (ranks, micro_batch) in SHARDINGS.items():
        found = trained_weights(processes, changed(spec, ranks=ranks, micro_batch=micro_batch))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=f"{sharding}: {name}")
