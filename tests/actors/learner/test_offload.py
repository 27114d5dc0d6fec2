"""A learner that rests outside its device's memory learns the same, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from tests.actors.learner.test_trainer import SPEC, assert_same, plan, published
from tests.actors.learner.toy_policy import ToyPolicy, changed, experiences


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloading_changes_no_bit_and_frees_what_it_says(mesh: DeviceMesh, tmp_path: Path, offload: str) -> None:
    spec = replace(
        SPEC,
        lora=None,
        optim=SPEC.optim.model_copy(update={"ema": 0.9}),
        learning=SPEC.learning.model_copy(update={"kl_beta": 0.1}),
    )

    def journey(spec: LearnerSpec, folder: Path) -> tuple[Trainer, list[dict[str, float]]]:
        trainer, figures = Trainer(ToyPolicy.load("3"), spec, mesh, torch.device("cpu")), []
        for seed in range(3):
            with trainer.resident():
                report = trainer.update(plan(experiences(2, 3, seed)), epochs=2)
            figures.append(dict(report.sums) | report.common)
            if seed == 1:
                with trainer.resident():
                    trainer.save(str(folder))
        return trainer, figures

    plain, figures = journey(spec, tmp_path / "plain")
    trainer, offloaded = journey(changed(spec, offload=offload), tmp_path / "offloaded")
    assert offloaded == figures

    def bytes_of(tensors: list[torch.Tensor]) -> int:
        return sum(getattr(t, "_local_tensor", t).untyped_storage().nbytes() for t in tensors)

    moments = [v for state in trainer.optimizer.adamw.state.values() for v in state.values()]
    average = trainer.optimizer.average
    assert len(moments) == 3 * len(trainer.parameters) and average is not None and trainer.frozen is not None
    assert bytes_of([*moments, *average.values]) == 0
    weights = [*trainer.policy.module.parameters(), *trainer.frozen.parameters()]
    assert (bytes_of(weights) == 0) == (offload == "all")

    with trainer.resident():
        assert_same(published(trainer, averaged=True), published(plain, averaged=True))
        assert_same(published(trainer), published(plain))
        trainer.restore(str(tmp_path / "plain"))
    with trainer.resident():
        trainer.update(plan(experiences(2, 3, 2)), epochs=2)
    with trainer.resident():
        assert_same(published(trainer), published(plain))  # restored, it goes on as the other did
