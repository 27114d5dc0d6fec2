"""The learner group on real processes: equal whatever the sharding, resumable, and never hanging.

Starting a rank costs seconds, so the tests share a group of one rank and a group of two, in the order they stand in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from actors.learner.group import LearnerGroup, LearnerSpec, RankDiedError
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.trainer import step_names
from actors.policy.lora import peft_names
from actors.policy.settings import LoraSection
from actors.weights.files import read_adapter
from actors.weights.transport import as_tensors, receive
from cluster.errors import CheckpointError, PlacementError, TrainingError, WorkerTimeoutError
from tests.actors.learner.toy_policy import POISON, RANDOM, ToyPolicy, changed, experiences

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
T = TypeVar("T")

SPEC = LearnerSpec(
    kind="tests.actors.learner.toy_policy:ToyPolicy",
    model_path="3",
    lora=LoraSection(rank=2, alpha=8.0),
    settings=LearnerSection(ranks=1, cpus=0.25, micro_batch=32, step_timeout_s=120.0),
    learning=GrpoSection(clip_low=0.2, clip_high=0.2, kl_beta=0.05, gate_every=1),
    optim=OptimSection(lr=1e-2, max_grad_norm=0.5, schedule="cosine", warmup_steps=1, max_skipped_steps=1),
    total_steps=20,
)
TWO = changed(SPEC, ranks=2, micro_batch=2, activation_checkpointing=True)
THREE = changed(SPEC, ranks=3, micro_batch=3)


@dataclass
class Shared:
    """One event loop, and the groups that live in it."""

    loop: asyncio.AbstractEventLoop
    groups: dict[int, LearnerGroup] = field(default_factory=dict)
    journeys: dict[int, Any] = field(default_factory=dict)

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(work)  # type: ignore[arg-type]

    def group(self, spec: LearnerSpec) -> LearnerGroup:
        if spec.settings.ranks not in self.groups:
            self.groups[spec.settings.ranks] = LearnerGroup(spec)
            self.run(self.groups[spec.settings.ranks].start())
        return self.groups[spec.settings.ranks]

    def journey(self, spec: LearnerSpec) -> Any:
        """Three updates from the start: the trained weights, the metrics, the base's hash."""
        if spec.settings.ranks not in self.journeys:
            self.journeys[spec.settings.ranks] = self.run(three_updates(self.group(spec)))
        return self.journeys[spec.settings.ranks]


@pytest.fixture(scope="module")
def shared(ray_local: None) -> Iterator[Shared]:
    shared = Shared(asyncio.new_event_loop())
    yield shared
    for group in shared.groups.values():
        shared.run(group.close())
    shared.loop.close()


def with_group(spec: LearnerSpec, body: Callable[[LearnerGroup], Awaitable[T]]) -> T:
    async def main() -> T:
        group = LearnerGroup(spec)
        try:
            await group.start()
            return await body(group)
        finally:
            await group.close()

    return asyncio.run(main())


async def weights_of(group: LearnerGroup) -> dict[str, np.ndarray]:
    return receive(await group.publish()).tensors


async def three_updates(group: LearnerGroup) -> tuple[dict[str, np.ndarray], list[dict[str, float]], str]:
    base = await group.base_hash()
    metrics = [await group.update(experiences(3, 4, seed)) for seed in range(2)]
    metrics.append(await group.update(experiences(1, 2, 7)))  # fewer items than ranks: the third rank only pads
    assert await group.base_hash() == base and len(await group.checksum()) == 32
    return await weights_of(group), metrics, base


def assert_close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, atol=1e-5)


@pytest.mark.parametrize("spec", [TWO, THREE], ids=["2 ranks, accumulation, checkpointing", "3 ranks, uneven"])
def test_every_sharding_makes_the_same_update(shared: Shared, spec: LearnerSpec) -> None:
    tensors, metrics, base = shared.journey(SPEC)
    start = peft_names(ToyPolicy.load("3", lora=SPEC.lora).module.state_dict())
    assert max(np.abs(v - start[k].numpy()).max() for k, v in tensors.items()) > 5e-3  # it did learn
    if spec is THREE:
        others, other_metrics, other_base = with_group(spec, three_updates)
    else:
        others, other_metrics, other_base = shared.journey(spec)
    assert_close(tensors, others)
    assert other_base == base
    for a, b in zip(metrics, other_metrics):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], abs=2e-5), name
        assert a["ratio_max_dev"] == b["ratio_max_dev"] == 0.0
        assert a["logp_diff_max"] > a["logp_diff_mean"] > 0
    assert metrics[1]["kl"] > metrics[0]["kl"] == 0.0


def test_one_step_equals_plain_torch(shared: Shared) -> None:
    """The group's first step has the loss and gradient of an unsharded policy under hand-made GRPO."""
    policy = ToyPolicy.load("3", lora=SPEC.lora)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    items = experiences(3, 4, 0)
    out = policy.forward(policy.collate(items))
    advantages = torch.tensor([i.advantage for i in items])[:, None]
    loss = -(torch.exp(out.logprobs - out.logprobs.detach()) * advantages)[out.mask].mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    first = shared.journey(SPEC)[1][0]
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)


def test_difference_to_the_sampler_is_reported_per_token_position(shared: Shared) -> None:
    """|learner − engine| at positions 0, 1, 2–3 and 4–7 of all completions, over ranks and micro-batches, by hand."""
    policy, items = ToyPolicy.load("3", lora=SPEC.lora), experiences(3, 4, 0)
    apart: dict[str, list[float]] = {"p0000": [], "p0001": [], "p0002": [], "p0004": []}
    for item in items:
        logprobs = policy.forward(policy.collate([item])).logprobs[0].tolist()
        for position, (ours, theirs) in enumerate(zip(logprobs, item.rollout_logprobs, strict=True)):
            apart[("p0000", "p0001", "p0002", "p0002", "p0004", "p0004")[position]].append(abs(ours - float(theirs)))
    for spec in (SPEC, TWO):
        first = shared.journey(spec)[1][0]
        reported = {name: value for name, value in first.items() if name.startswith("logp_diff_p")}
        expected = {f"logp_diff_{name}": np.mean(values) for name, values in apart.items()}
        assert reported == pytest.approx(expected, abs=1e-5)
        assert first["logp_diff_mean"] == pytest.approx(
            np.mean([v for values in apart.values() for v in values]), abs=1e-5
        )


@pytest.mark.parametrize(("length", "names"), [(1, 1), (2, 2), (64, 7), (4096, 13)])
def test_positions_share_few_names_however_long_the_completion(length: int, names: int) -> None:
    item = replace(experiences(1, 1)[0], token_ids=np.zeros(length, np.int32))
    seen = step_names(item)
    assert len(seen) == length and len(set(seen)) == names and seen == sorted(seen) and seen[0] == "p0000"


def test_save_with_two_ranks_restore_with_one_and_export(shared: Shared, tmp_path: Path) -> None:
    shared.journey(SPEC), shared.journey(TWO)
    two, one = shared.group(TWO), shared.group(SPEC)
    state, adapter_folder = str(tmp_path / "state"), tmp_path / "adapter"

    async def first() -> dict[str, np.ndarray]:
        await two.update(experiences(4, 3, 3), updates=2)
        assert two.version == 5
        await two.save(state)
        await two.update(experiences(3, 4, 1), updates=2)
        await two.export(str(adapter_folder))
        return await weights_of(two)

    async def second() -> dict[str, np.ndarray]:
        await one.restore(state)
        assert one.version == 5
        metrics = await one.update(experiences(3, 4, 1), updates=2)
        assert one.version == two.version == 7 and metrics["updates"] == metrics["applied"] == 2
        return await weights_of(one)

    expected = shared.run(first())
    assert_close(expected, shared.run(second()))
    adapter = read_adapter(adapter_folder)
    assert adapter.adapter_config["r"] == 2 and adapter.adapter_config["peft_type"] == "LORA"
    for name, value in expected.items():
        np.testing.assert_array_equal(adapter.tensors[name], value)
    loaded = peft_names(ToyPolicy.load("3", lora=SPEC.lora, adapter=str(adapter_folder)).module.state_dict())
    for name, tensor in as_tensors(adapter).items():
        torch.testing.assert_close(loaded[name], tensor)
    with pytest.raises(CheckpointError, match="not a learner's checkpoint"):
        shared.run(one.restore(str(tmp_path)))
    facts = Path(state, "learner.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"lora": {"rank": 9, "alpha": 8.0}}))
    with pytest.raises(CheckpointError, match="'rank': 9"):
        shared.run(one.restore(state))


def test_ratio_gate_refuses_a_policy_with_randomness(shared: Shared) -> None:
    group = shared.group(SPEC)
    before = shared.run(group.checksum())
    with pytest.raises(TrainingError, match="ratio gate"):
        shared.run(group.update(experiences(2, 3, 0, token=RANDOM)))
    assert shared.run(group.checksum()) == before


def test_non_finite_gradients_skip_the_step_on_all_ranks_and_are_counted(shared: Shared) -> None:
    group = shared.group(TWO)

    async def body() -> None:
        before, version = await group.checksum(), group.version
        metrics = await group.update(experiences(2, 3, 0, token=POISON))
        assert metrics["skipped"] == 1 and group.version == version and await group.checksum() == before
        metrics = await group.update(experiences(2, 3, 0))
        assert metrics["skipped"] == 1 and group.version == version + 1 and await group.checksum() != before
        with pytest.raises(TrainingError, match="max_skipped_steps=1"):
            await group.update(experiences(2, 3, 1, token=POISON))

    shared.run(body())


def test_killed_rank_fails_the_running_call_within_seconds(shared: Shared) -> None:
    group = shared.group(TWO)

    async def body() -> None:
        pid = group.infos[1].pid
        os.kill(pid, signal.SIGSTOP)  # it stands still in the middle of the next call …
        call = asyncio.ensure_future(group.update(experiences(2, 2)))
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGKILL)  # … and dies there
        started = time.monotonic()
        with pytest.raises(RankDiedError, match=rf"rank 1 \(node .*, pid {pid}\) died during update"):
            await call
        assert time.monotonic() - started < 15
        with pytest.raises(TrainingError, match="cannot work"):
            await group.update(experiences(2, 2))

    shared.run(body())


def test_silent_rank_is_named_at_the_deadline(shared: Shared) -> None:
    group = shared.group(SPEC)
    group.spec = changed(SPEC, step_timeout_s=1.0)
    os.kill(group.infos[0].pid, signal.SIGSTOP)
    with pytest.raises(WorkerTimeoutError, match=r"rank 0 .*did not answer base_hash within 1 s"):
        shared.run(group.base_hash())
    with contextlib.suppress(ProcessLookupError):
        os.kill(group.infos[0].pid, signal.SIGCONT)  # so that it can obey the order to end


def test_full_weights_with_a_frozen_reference_and_importance_weights() -> None:
    grpo = GrpoSection(kl_beta=0.1, old_logprobs="rollout", importance_cap=0.6, loss_norm="sequence")

    async def body(group: LearnerGroup) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
        metrics = [await group.update(experiences(2, 3, 0)) for _ in range(2)]
        weights = receive(await group.publish())
        assert weights.kind == "full" and weights.version == 2
        return metrics, weights.tensors

    metrics, tensors = with_group(replace(SPEC, lora=None, learning=grpo), body)
    assert metrics[0]["kl"] == 0.0 < metrics[1]["kl"]  # the reference stayed where training began
    # The ratio is the learner's own; how far the sampler is from it decides the importance weights.
    assert metrics[0]["ratio_max_dev"] == 0.0 < metrics[0]["truncated_frac"] < 1.0 and metrics[0]["logp_diff_mean"] > 0
    assert tensors.keys() == ToyPolicy.load("3").module.state_dict().keys()


def test_no_room_is_said_at_the_start() -> None:
    with pytest.raises(PlacementError, match="no room for 2 ranks"):
        with_group(changed(SPEC, ranks=2, cpus=500.0, start_timeout_s=1.0), lambda g: g.checksum())
