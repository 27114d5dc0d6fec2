"""One rank's learner in this process: epochs over a batch, the moving average, and guidance inside the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.batches import plan_batch
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from actors.policy.lora import peft_names
from actors.policy.protocol import trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import RenderRequest, SdeSpec, VdmExperience
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.weights.transport import as_tensors
from cluster.errors import CheckpointError
from tests.actors.learner.toy_policy import ToyPolicy, changed, experiences

LORA = LoraSection(rank=2, alpha=8.0)
SPEC = LearnerSpec(
    kind="toy",
    model_path="3",
    settings=LearnerSection(ranks=1),
    lora=LORA,
    optim=OptimSection(lr=3e-2, max_grad_norm=0.5),
    learning=GrpoSection(clip_low=0.1, clip_high=0.1),
)
Tensors = dict[str, torch.Tensor]


def toy(mesh: DeviceMesh, spec: LearnerSpec = SPEC) -> Trainer:
    return Trainer(ToyPolicy.load("3", lora=LORA), spec, mesh, torch.device("cpu"))


def plan(items: list, updates: int = 1) -> list:
    return plan_batch(items, ranks=1, micro_batch=32, updates=updates)[0]


def published(trainer: Trainer, averaged: bool = False) -> Tensors:
    weights = trainer.weights(averaged)
    assert weights is not None
    return as_tensors(weights)


def assert_same(one: Tensors, other: Tensors, **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **(tolerance or {"rtol": 0, "atol": 0}))


# --- several epochs over a batch ------------------------------------------------------------------------------------


def test_epochs_keep_the_policy_before_the_first_step_as_the_old_one(mesh: DeviceMesh) -> None:
    """Against a loop in plain torch: two epochs of two steps, old log-probabilities made once."""
    items = experiences(4, 3)
    plain = ToyPolicy.load("3", lora=LORA)
    parameters = trainable_parameters(plain.module)
    optimizer = torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.0)
    halves = [plain.collate(items[:6]), plain.collate(items[6:])]
    advantages = [torch.tensor([i.advantage for i in half]) for half in (items[:6], items[6:])]
    with torch.no_grad():
        old = [plain.forward(half).logprobs for half in halves]
    deviation = 0.0
    for _ in range(2):
        for batch, before, advantage in zip(halves, old, advantages):
            out = plain.forward(batch)
            ratio = torch.exp(out.logprobs - before)
            deviation = max(deviation, float((ratio.detach() - 1).abs()[out.mask].max()))
            clipped = ratio.clamp(0.9, 1.1)
            loss = -torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])[out.mask].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    trainer = toy(mesh)
    report = trainer.update(plan(items, updates=2), epochs=2)
    assert_same(published(trainer), peft_names(plain.module.state_dict()), rtol=1e-5, atol=1e-6)
    assert trainer.version == 4 and report.common["updates"] == 4
    assert report.common["ratio_max_dev"] == 0.0  # the gate looks at the first step only
    assert deviation > 0.1 and report.sums["clipped"] > 0  # the later ones did leave the old policy
    again = toy(mesh)
    for _ in range(2):
        again.update(plan(items, updates=2))  # two batches of the same items: other old log-probabilities
    with pytest.raises(AssertionError):
        assert_same(published(trainer), published(again), rtol=1e-5, atol=1e-6)


def test_epochs_on_the_engines_log_probabilities_equal_those_on_the_learners_where_the_two_agree(
    mesh: DeviceMesh,
) -> None:
    policy, items = ToyPolicy.load("3", lora=LORA), experiences(4, 3)
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
    agreed = [replace(i, rollout_logprobs=row[: len(i.token_ids)].numpy()) for i, row in zip(items, out.logprobs)]
    results = []
    for source in ("learner", "rollout"):
        trainer = toy(
            mesh,
            replace(SPEC, learning=SPEC.learning.model_copy(update={"old_logprobs": source, "importance_cap": 100.0})),
        )
        assert trainer.update(plan(agreed, updates=2), epochs=3).sums["clipped"] > 0
        results.append(published(trainer))
    assert_same(*results, rtol=1e-5, atol=1e-6)


# --- the ratio gate ------------------------------------------------------------------------------------------------


def count_passes_without_gradient(trainer: Trainer) -> Callable[[], int]:
    """Count from now on; calling what is returned ends the count and returns it."""
    forward, seen = trainer.policy.forward, []

    def counting(batch: Any) -> Any:
        seen.append(not torch.is_grad_enabled())
        return forward(batch)

    trainer.policy.forward = counting  # type: ignore[method-assign]

    def end() -> int:
        trainer.policy.forward = forward  # type: ignore[method-assign]
        return sum(seen)

    return end


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 2)])
def test_the_gate_costs_passes_and_changes_no_bit(mesh: DeviceMesh, tmp_path: Path, updates: int, epochs: int) -> None:
    """Every step checked, every third, and every third with a restart between: the same weights and figures."""

    def journey(gate_every: int, restart: bool = False) -> tuple[Tensors, list[dict[str, float]], list[int]]:
        spec = replace(SPEC, learning=SPEC.learning.model_copy(update={"gate_every": gate_every, "kl_beta": 0.1}))
        trainer, figures, passes = toy(mesh, spec), [], []
        for seed in range(4):
            if restart and seed == 2:
                trainer.save(str(tmp_path / "state"))
                trainer = toy(mesh, spec)
                trainer.restore(str(tmp_path / "state"))
            without = count_passes_without_gradient(trainer)
            report = trainer.update(plan(experiences(4, 3, seed), updates), epochs)
            figures.append(dict(report.sums) | report.maxima | report.common)
            passes.append(without() - updates * epochs)  # less those of the reference
        return published(trainer), figures, passes

    always, figures, passes = journey(1)
    seldom, same, fewer = journey(3)
    again, resumed, _ = journey(3, restart=True)
    assert_same(always, seldom)
    assert_same(always, again)
    assert figures == same == resumed
    # Four steps of an update always meet a multiple of three; single ones do so in the first and the fourth.
    assert passes == [updates] * 4 and fewer == ([1, 0, 0, 1] if updates == 1 else passes)


def test_the_policies_of_a_run_learn_the_same_with_and_without_the_gate(
    mesh: DeviceMesh, guided: tuple[VdmPolicy, list[VdmExperience]]
) -> None:
    policy, items = guided
    results = []
    for steps, gate_every in ((0, 1), (1, 10)):
        grpo = GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.004, loss_norm="sequence", gate_every=gate_every)
        trainer = Trainer(copy.deepcopy(policy), replace(SPEC, kind="vdm", learning=grpo), mesh, torch.device("cpu"))
        trainer.optimizer.steps = steps  # of a constant learning rate
        report = trainer.update(plan(items))
        results.append((published(trainer), dict(report.sums) | report.maxima | report.common))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


# --- moving average -------------------------------------------------------------------------------------------------


def test_average_is_exported_and_published_weights_are_raw(mesh: DeviceMesh, tmp_path: Path) -> None:
    spec = replace(SPEC, optim=SPEC.optim.model_copy(update={"ema": 0.15}))
    trainer, raw = toy(mesh, spec), toy(mesh)
    expected = published(trainer)
    for step, decay in enumerate([0.1, 0.15, 0.15]):
        for learner in (trainer, raw):
            learner.update(plan(experiences(3, 4, step)))
        now = published(trainer)
        assert_same(now, published(raw))  # the average changes neither what is trained nor what samples
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
    trainer.export(str(tmp_path / "adapter"))
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_same(exported, expected, rtol=1e-5, atol=1e-7)
    assert_same(published(trainer, averaged=True), exported)
    assert_same(published(trainer), now)
    assert max(float((exported[n] - now[n]).abs().max()) for n in now) > 1e-3
    assert_same(published(raw, averaged=True), now)  # without one, the weights are their own average


def test_average_survives_a_checkpoint(mesh: DeviceMesh, tmp_path: Path) -> None:
    spec = replace(SPEC, optim=SPEC.optim.model_copy(update={"ema": 0.9}))
    whole = toy(mesh, spec)
    for step in range(4):
        if step == 2:
            whole.save(str(tmp_path / "state"))
        whole.update(plan(experiences(3, 4, step)))
    resumed = toy(mesh, spec)
    resumed.restore(str(tmp_path / "state"))
    for step in (2, 3):
        resumed.update(plan(experiences(3, 4, step)))
    assert_same(published(resumed), published(whole))
    assert_same(published(resumed, averaged=True), published(whole, averaged=True))
    with pytest.raises(CheckpointError, match=r"ema=0\.9, this learner has ema=0\.0"):
        toy(mesh).restore(str(tmp_path / "state"))


def test_a_skipped_step_leaves_the_average_alone(mesh: DeviceMesh) -> None:
    from tests.actors.learner.toy_policy import POISON

    trainer = toy(mesh, replace(SPEC, optim=SPEC.optim.model_copy(update={"ema": 0.9})))
    trainer.update(plan(experiences(2, 3, 0)))
    before = published(trainer, averaged=True)
    trainer.update(plan(experiences(2, 3, 0, token=POISON)))
    assert trainer.optimizer.skipped == 1
    assert_same(published(trainer, averaged=True), before)


# --- KL estimator ---------------------------------------------------------------------------------------------------


def test_the_configured_estimator_is_the_one_that_is_used(mesh: DeviceMesh) -> None:
    values = {}
    for name in ("k1", "k2", "k3"):
        trainer = toy(
            mesh, replace(SPEC, learning=SPEC.learning.model_copy(update={"kl_beta": 0.1, "kl_estimator": name}))
        )
        trainer.update(plan(experiences(3, 4, 0)))
        batch = trainer.policy.collate(experiences(3, 4, 1))
        with torch.no_grad():
            out = trainer.policy.forward(batch)
            with trainer.policy.reference():
                delta = (trainer.policy.forward(batch).logprobs - out.logprobs)[out.mask]
        expected = {"k1": -delta, "k2": delta**2 / 2, "k3": torch.expm1(delta) - delta}[name]
        values[name] = trainer.update(plan(experiences(3, 4, 1))).sums["kl"]
        assert values[name] == pytest.approx(float(expected.sum()), rel=1e-4)
    assert len({round(v, 6) for v in values.values()}) == 3


# --- guidance inside the policy -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(tiny_vdm_dir: Path) -> tuple[VdmPolicy, list[VdmExperience]]:
    policy = VdmPolicy.load(tiny_vdm_dir, lora=LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    sde = SdeSpec("flow", 0.7, window_start=0, window_size=2)
    requests = [
        RenderRequest("s", i, "the red circle rises", frames, 9, 4, 3.0, noise_seed=1, sde_seed=i, sde=sde)
        for i in range(4)
    ]
    items = [
        VdmExperience("s", c.index, c.caption, frames, c.trajectory, (-1.0) ** c.index)
        for c in sample(policy, requests)
        if c.trajectory is not None
    ]
    return policy, items


def test_guided_policy_starts_from_a_ratio_of_one_and_repeats_the_sampler(
    mesh: DeviceMesh, guided: tuple[VdmPolicy, list[VdmExperience]]
) -> None:
    policy, items = guided
    grpo = GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.004, loss_norm="sequence", kl_estimator="closed")
    trainer = Trainer(copy.deepcopy(policy), replace(SPEC, kind="vdm", learning=grpo), mesh, torch.device("cpu"))
    report = trainer.update(plan(items))
    assert [i.trajectory.guidance for i in items] == [3.0] * 4
    assert report.common["ratio_max_dev"] == 0.0  # two passes of the learner
    assert report.maxima["logp_diff_max"] == 0.0  # and of the sampler, in the same batch
    assert report.common["grad_norm"] > 0 and report.sums["kl"] > 0


def test_a_bfloat16_learner_hands_its_network_what_the_sampler_hands_it(
    mesh: DeviceMesh, guided: tuple[VdmPolicy, list[VdmExperience]], tiny_vdm_dir: Path
) -> None:
    """Its parameters are float32, so the dtype of their compute must be told; what is learnt from stays float32."""
    _, items = guided
    policy = VdmPolicy.load(tiny_vdm_dir, lora=LORA)
    batch = policy.collate(items)
    assert policy.compute_dtype == torch.float32
    with torch.no_grad():
        exact = policy.forward(batch)
    Trainer(policy, changed(replace(SPEC, kind="vdm"), dtype="bfloat16"), mesh, torch.device("cpu"))
    seen = []
    policy.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["hidden_states"].dtype, kwargs["encoder_hidden_states"].dtype)),
        with_kwargs=True,
        prepend=True,  # before FSDP's own casting
    )
    out = policy.forward(batch)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert (batch.before.dtype, batch.after.dtype, batch.sigmas.dtype) == (torch.float32,) * 3
    assert out.mean is not None and out.std is not None and exact.mean is not None
    assert (out.logprobs.dtype, out.mean.dtype, out.std.dtype) == (torch.float32,) * 3
    assert (out.mean != out.mean.bfloat16().float()).float().mean() > 0.9  # not rounded on the way
    torch.testing.assert_close(out.mean, exact.mean, rtol=0, atol=0.05)


def test_unguided_learner_would_not_repeat_a_guided_sampler(guided: tuple[VdmPolicy, list[VdmExperience]]) -> None:
    policy, items = guided
    blind = [replace(i, trajectory=replace(i.trajectory, guidance=1.0)) for i in items]
    with torch.no_grad():
        difference = policy.forward(policy.collate(blind)).logprobs - policy.rollout_logprobs(items)
    assert difference.abs().max() > 1e-4


def test_the_gradient_goes_through_both_branches_of_the_guidance(
    guided: tuple[VdmPolicy, list[VdmExperience]],
) -> None:
    """v = v₋ + g (v₊ − v₋), so the gradient is (1 − g) that of the negative branch plus g that of the caption's."""
    policy, items = guided
    batch = policy.collate(items)
    x, sigma = batch.before[0], batch.sigmas[0, 0]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    parameters = trainable_parameters(policy.module)

    def gradient(condition) -> list[torch.Tensor]:
        return torch.autograd.grad((policy.velocity(x, sigma, condition) * weight).sum(), parameters)

    assert batch.condition.negative is not None
    plain = replace(batch.condition, negative=None)
    both = gradient(batch.condition)
    caption, negative = gradient(plain), gradient(replace(plain, text=batch.condition.negative))
    scale = max(float(g.abs().max()) for g in both)
    for a, c, n in zip(both, caption, negative):
        torch.testing.assert_close(a, 3.0 * c - 2.0 * n, rtol=1e-3, atol=1e-5 * scale)
    assert max(float(n.abs().max()) for n in negative) > 0.1 * scale / 3  # the negative branch is no bystander


def test_closed_form_has_no_estimator(guided: tuple[VdmPolicy, list[VdmExperience]]) -> None:
    policy, items = guided
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
    with pytest.raises(ValueError, match="use 'closed'"):
        policy.kl(out, out, "k3")


# --- micro-batches over members and over steps ----------------------------------------------------------------------


def updated(mesh: DeviceMesh, guided: tuple[VdmPolicy, list[VdmExperience]], micro: int, steps: int | None, **grpo):
    """The adapter after one update cut as told, its report, and the most bytes kept for a backward pass."""
    policy, items = guided
    loss = GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.1, kl_estimator="closed", **grpo)
    # At a rate of 1e-3 Adam's first step, lr × sign(gradient), does not blow up the noise of gradients that are nearly 0.
    optim = OptimSection(lr=1e-3, max_grad_norm=0.5)
    spec = changed(replace(SPEC, kind="vdm", learning=loss, optim=optim), micro_batch=micro, micro_steps=steps)
    trainer = Trainer(copy.deepcopy(policy), spec, mesh, torch.device("cpu"))
    kept, most = 0, 0
    backward = torch.Tensor.backward

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept, most
        kept += tensor.nbytes
        most = max(most, kept)
        return tensor

    def release(self: torch.Tensor, *args, **kwargs) -> None:
        nonlocal kept
        backward(self, *args, **kwargs)
        kept = 0

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(torch.Tensor, "backward", release)
        report = trainer.update(plan_batch(items, ranks=1, micro_batch=micro, updates=1)[0])
    return published(trainer), report, most


@pytest.mark.parametrize("loss_norm", ["sequence", "token"])
@pytest.mark.parametrize("old_logprobs", ["learner", "rollout"])
def test_however_it_is_cut_the_update_is_the_same(mesh: DeviceMesh, guided, loss_norm: str, old_logprobs: str) -> None:
    whole, report, most = updated(mesh, guided, 4, None, loss_norm=loss_norm, old_logprobs=old_logprobs)
    for micro, steps in ((4, 1), (1, 1)):
        parts, other, peak = updated(mesh, guided, micro, steps, loss_norm=loss_norm, old_logprobs=old_logprobs)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5)
        assert other.common["grad_norm"] == pytest.approx(report.common["grad_norm"], rel=1e-4)
        assert other.sums["steps"] == report.sums["steps"] == 8
        for name in ("loss", "kl"):
            assert other.sums[name] == pytest.approx(report.sums[name], rel=1e-3, abs=1e-6)
        assert other.sums["logp_diff_steps"] == report.sums["logp_diff_steps"]
        assert peak < 0.6 * most  # one step's activations at a time, of two
