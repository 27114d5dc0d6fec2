"""The bound on log-ratios, seen from the learner: an update far from its reference is applied, and says what was cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.batches import plan_batch
from actors.learner.group import merge_reports
from actors.learner.objectives.grpo import LOG_RATIO_BOUND
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from actors.policy.settings import LoraSection
from tests.actors.learner.toy_policy import ToyPolicy, experiences

LORA, ALONE = LoraSection(rank=2, alpha=8.0), LearnerSection(ranks=1)


def far_policy() -> ToyPolicy:
    """A policy whose adapter has moved its log-probabilities by hundreds of nats."""
    policy = ToyPolicy.load("3", lora=LORA)
    with torch.no_grad():
        policy.module.head.weight.mul_(300.0)  # type: ignore[union-attr, operator]
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_update_far_from_its_reference_is_applied_and_says_what_was_cut(mesh: DeviceMesh, estimator: str) -> None:
    items, policy = experiences(4, 3), far_policy()
    out = policy.forward(policy.collate(items))
    with policy.reference():
        delta = (policy.forward(policy.collate(items)).logprobs - out.logprobs)[out.mask].detach()
    assert float(delta.max()) > 89  # exp would be infinite
    spec = LearnerSpec("toy", "3", ALONE, lora=LORA, learning=GrpoSection(kl_beta=0.1, kl_estimator=estimator))
    trainer = Trainer(policy, spec, mesh, torch.device("cpu"))
    plan = plan_batch(items, ranks=1, micro_batch=32, updates=1)[0]
    metrics = merge_reports([trainer.update(plan)])
    assert metrics["applied"] == 1 and metrics["skipped"] == 0
    cut = float((delta.abs() > LOG_RATIO_BOUND).float().mean()) if estimator == "k3" else 0.0  # k3 alone takes an exp
    assert metrics["bounded_frac"] == pytest.approx(cut)
    assert all(p.isfinite().all() for p in trainer.parameters)


def test_an_engine_far_away_is_counted_too(mesh: DeviceMesh) -> None:
    """Engine and learner 90 nats apart in one completion of twelve; without an advantage it is not a number either."""
    items = experiences(4, 3)
    items[0] = replace(items[0], rollout_logprobs=items[0].rollout_logprobs - 90, advantage=0.0)
    spec = LearnerSpec("toy", "3", ALONE, lora=LORA, learning=GrpoSection(old_logprobs="rollout"))
    trainer = Trainer(ToyPolicy.load("3", lora=LORA), spec, mesh, torch.device("cpu"))
    metrics = merge_reports([trainer.update(plan_batch(items, ranks=1, micro_batch=32, updates=1)[0])])
    tokens = sum(len(item.token_ids) for item in items)
    assert metrics["applied"] == 1 and metrics["bounded_frac"] == pytest.approx(len(items[0].token_ids) / tokens)
