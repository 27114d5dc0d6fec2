"""The moving average over two real ranks: by hand from what was published, exported, and restored by one rank."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from actors.learner.group import LearnerGroup, LearnerSpec
from actors.learner.settings import LearnerSection, OptimSection
from actors.policy.lora import peft_names
from actors.policy.settings import LoraSection
from actors.weights.files import read_adapter
from actors.weights.transport import receive
from tests.actors.learner.toy_policy import ToyPolicy, changed, experiences

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
DECAY = 0.15
SPEC = LearnerSpec(
    kind="tests.actors.learner.toy_policy:ToyPolicy",
    model_path="3",
    lora=LoraSection(rank=3, alpha=8.0),  # three rows over two ranks: uneven shards
    settings=LearnerSection(ranks=2, cpus=0.25, step_timeout_s=120.0),
    optim=OptimSection(lr=3e-2, ema=DECAY),
)
Arrays = dict[str, np.ndarray]


def with_group(spec: LearnerSpec, body: Callable[[LearnerGroup], Awaitable[None]]) -> None:
    async def main() -> None:
        group = LearnerGroup(spec)
        try:
            await group.start()
            await body(group)
        finally:
            await group.close()

    asyncio.run(main())


def assert_close(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, atol=1e-6, err_msg=name)


def test_average_over_two_ranks_is_exported_saved_and_restored_by_one(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    start = peft_names(ToyPolicy.load("3", lora=SPEC.lora).module.state_dict())
    mean: Arrays = {name: value.numpy().copy() for name, value in start.items()}

    async def two(group: LearnerGroup) -> None:
        for step, decay in enumerate([0.1, DECAY, DECAY]):
            await group.update(experiences(3, 4, step))
            raw = receive(await group.publish()).tensors
            for name, value in raw.items():
                mean[name] = decay * mean[name] + (1 - decay) * value
        await group.save(state)
        await group.export(str(tmp_path / "two"))
        averaged = receive(await group.publish(averaged=True)).tensors
        exported = read_adapter(tmp_path / "two").tensors
        assert_close(mean, exported)
        assert_close(exported, averaged)
        assert_close(raw, receive(await group.publish()).tensors)  # what is trained, and what samples, is as it was
        assert max(float(np.abs(raw[n] - mean[n]).max()) for n in raw) > 1e-3
        await group.update(experiences(3, 4, 3))
        await group.export(str(tmp_path / "later"))

    async def one(group: LearnerGroup) -> None:
        await group.restore(state)
        await group.export(str(tmp_path / "restored"))
        assert_close(mean, read_adapter(tmp_path / "restored").tensors)
        await group.update(experiences(3, 4, 3))
        await group.export(str(tmp_path / "again"))
        assert_close(read_adapter(tmp_path / "later").tensors, read_adapter(tmp_path / "again").tensors)

    with_group(SPEC, two)
    with_group(changed(SPEC, ranks=1), one)
