"""The GRPO loss and its gradient against TRL's own code on the same tensors, and by hand.

Two ways. ``GRPOTrainer._compute_loss`` is called with our log-probabilities where its model would give its own, over
many random batches and all settings. And a whole ``GRPOTrainer`` with a small causal model takes completions from a
foreign engine, makes old, reference and importance ratios and advantages itself, and is matched by our functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.learner.objectives.base import LossStats
from actors.learner.objectives.grpo import grpo_loss, importance_weights, k3, normaliser
from actors.learner.objectives.settings import CispoSection, GspoSection, TokenGrpoSection
from actors.learner.objectives.table import make_objective
from pipeline.stages.advantages import group_advantages

LENGTH = 11  # TRL's max_completion_length, our constant_length
TRL_LOSS = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}
SHAPES = [(1, 1), (2, 3), (8, 11)]


@pytest.fixture(scope="module")
def trl() -> Iterator[Any]:
    """TRL's GRPO module, without the vLLM that it imports where there is one: it generates nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl import import_utils

        patch.setattr(import_utils, "is_vllm_available", lambda min_version=None: False)
        from trl.trainer import grpo_trainer

        yield grpo_trainer


@dataclass
class Batch:
    """What both sides read: (B, T) log-probabilities of four policies, (B,) advantages, (B, T) mask."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor


def random_batch(shape: tuple[int, int], seed: int) -> Batch:
    """Policies some tenths of a nat apart, so that every branch of the loss is taken; completions end anywhere."""
    rng = torch.Generator().manual_seed(seed)
    current = -3 * torch.rand(shape, generator=rng, dtype=torch.float64)
    old, ref, rollout = (current + 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=rng)
    advantages = torch.randn(shape[0], generator=rng, dtype=torch.float64)
    return Batch(current.requires_grad_(), old, ref, rollout, advantages, torch.arange(shape[1]) < lengths)


class LossOnly:
    """What ``_compute_loss`` reads of its trainer, with the batch's log-probabilities in place of a model's."""

    def __init__(self, trl: Any, loss_norm: str, low: float, high: float, beta: float, correction: bool) -> None:
        self.compute: Callable[..., Tensor] = partial(trl.GRPOTrainer._compute_loss, self)
        self.loss_type, self.epsilon_low, self.epsilon_high, self.beta = TRL_LOSS[loss_norm], low, high, beta
        self.use_vllm = self.vllm_importance_sampling_correction = correction
        self.max_completion_length = LENGTH
        self.importance_sampling_level, self.top_entropy_quantile = "token", 1.0
        self.off_policy_mask_threshold, self.aux_loss_enabled, self._entropy_bonus_enabled = None, False, False
        self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
        self.current_gradient_accumulation_steps = 1
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model: Batch, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return model.logprobs, torch.zeros_like(model.old), None

    def __call__(self, data: Batch, cap: float, correction: str = "token_tis") -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient with respect to the current log-probabilities."""
        mask = data.mask.long()
        difference = (data.old - data.rollout) * mask
        if correction != "token_tis":
            difference = difference.sum(-1, keepdim=True)
        ratio = torch.exp(difference)
        ratio = ratio.masked_fill(ratio > cap, 0.0) if correction == "sequence_mask" else ratio.clamp(max=cap)
        inputs = {
            "prompt_ids": mask[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": data.advantages,
            "old_per_token_logps": data.old,
            "ref_per_token_logps": data.ref,
            # Its modes token_truncate, sequence_truncate and sequence_mask, as the trainer computes them where it generates:
            # see the last test.
            "importance_sampling_ratio": ratio,
            "num_items_in_batch": mask.sum(),
        }
        loss = self.compute(data, inputs)
        return loss.detach(), torch.autograd.grad(loss, data.logprobs)[0]

    def metric(self, name: str) -> float:
        return self._metrics["train"][name][-1]


def our_loss(
    data: Batch, loss_norm: str, low: float, high: float, beta: float, correction: bool, cap: float
) -> tuple[Tensor, LossStats]:
    return grpo_loss(
        data.logprobs,
        data.old,
        data.advantages,
        data.mask,
        clip_low=low,
        clip_high=high,
        loss_norm=loss_norm,
        normaliser=normaliser(data.mask, loss_norm, LENGTH),
        kl=k3(data.logprobs, data.ref),
        beta=beta,
        rollout_logprobs=data.rollout if correction else None,
        importance_cap=cap,
    )


@pytest.mark.parametrize("correction", [False, True], ids=["on policy", "importance sampling"])
@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["no KL", "KL"])
@pytest.mark.parametrize("high", [0.2, 0.28], ids=["clip", "clip-higher"])
@pytest.mark.parametrize("loss_norm", ["sequence", "token", "constant"])
def test_loss_and_gradient_equal_trl(trl: Any, loss_norm: str, high: float, beta: float, correction: bool) -> None:
    settings = (loss_norm, 0.2, high, beta, correction)
    theirs = LossOnly(trl, *settings)
    clipped = truncated = 0.0
    for seed in range(20):
        data = random_batch(SHAPES[seed % len(SHAPES)], seed)
        loss, stats = our_loss(data, *settings, cap=1.3)
        (gradient,) = torch.autograd.grad(loss, data.logprobs)
        expected, expected_gradient = theirs(data, cap=1.3)
        torch.testing.assert_close(loss.detach(), expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-12)
        assert stats.clipped_low / stats.steps == pytest.approx(theirs.metric("clip_ratio/low_mean"), abs=1e-6)
        assert stats.clipped_high / stats.steps == pytest.approx(theirs.metric("clip_ratio/high_mean"), abs=1e-6)
        if beta:
            assert stats.kl / stats.steps == pytest.approx(theirs.metric("kl"), rel=1e-6)
        clipped, truncated = clipped + stats.clipped, truncated + stats.truncated
    assert clipped > 50, "the comparison must have met clipped steps"
    assert (truncated > 50) == correction


@pytest.mark.parametrize("correction", [None, "token_tis", "sequence_tis", "sequence_mask"])
@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["no KL", "KL"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_each_objective_and_correction_equals_trl(trl: Any, name: str, beta: float, correction: str | None) -> None:
    """TRL's CISPO takes ε_max itself where ours takes what it is above 1; its sequence weights are (B, 1)."""
    low, high, cap = (0.2, 0.28, 1.3) if name != "gspo" else (0.05, 0.06, 1.3)
    norm = "token" if name == "cispo" else "sequence"
    theirs = LossOnly(trl, norm, low, 1.0 + high if name == "cispo" else high, beta, correction is not None)
    theirs.loss_type = "cispo" if name == "cispo" else "grpo"
    theirs.importance_sampling_level = "sequence" if name == "gspo" else "token"
    kind = {"grpo": TokenGrpoSection, "gspo": GspoSection, "cispo": CispoSection}[name]
    switches = {"old_logprobs": "rollout", "rollout_correction": correction} if correction else {}
    settings = kind(clip_low=low, clip_high=high, loss_norm=norm, kl_beta=beta, importance_cap=cap, **switches)
    if name == "cispo":
        settings = settings.model_copy(update={"clip_low": 1.0})
    ours = make_objective(name, settings)
    clipped = truncated = 0.0
    for seed in range(20):
        data = random_batch(SHAPES[seed % len(SHAPES)], seed)
        kl = k3(data.logprobs, data.ref)
        total, stats = ours.loss(  # type: ignore[attr-defined]
            data.logprobs, data.old, data.advantages, data.mask, rollout_logprobs=data.rollout, kl=kl
        )
        loss = total / ours.normaliser(data.mask)  # type: ignore[attr-defined]
        (gradient,) = torch.autograd.grad(loss, data.logprobs)
        expected, expected_gradient = theirs(data, cap, correction or "token_tis")
        torch.testing.assert_close(loss.detach(), expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-12)
        if name == "cispo":
            assert stats.clipped_high / stats.steps == pytest.approx(theirs.metric("cispo_clip_ratio"), abs=1e-6)
        clipped, truncated = clipped + stats.clipped, truncated + stats.truncated
    assert clipped > 50, "the comparison must have met clipped steps"
    assert (truncated > 50) == (correction is not None)


VOCAB, PAD, EOS, GROUP = 16, 0, 1, 4
PROMPTS = [[3, 4, 5], [6, 7, 8]]


def causal_model(folder: Path) -> str:
    """A causal model and tokenizer folder: words w0 … w15, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def move(model: torch.nn.Module, seed: int, by: float = 0.03) -> None:
    """Take a step of its own, as an optimizer would."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(by * torch.randn(p.shape, generator=rng))


def token_logprobs(model: torch.nn.Module, completions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return (B, T) log-probabilities after their prompts, one completion at a time, and their mask."""
    rows = []
    for i, tokens in enumerate(completions):
        prompt = PROMPTS[i // GROUP]
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        rows.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[:, None])[:, 0])
    mask = torch.arange(LENGTH) < torch.tensor([len(r) for r in rows])[:, None]
    return torch.stack([torch.nn.functional.pad(r, (0, LENGTH - len(r))) for r in rows]), mask


def test_a_whole_trl_trainer_makes_the_same_advantages_weights_loss_and_gradient(trl: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl.trainer.grpo_config import GRPOConfig

    rng = np.random.default_rng(0)
    folder = causal_model(tmp_path / "model")
    completions = [rng.integers(3, VOCAB, n).tolist() for n in (2, 5, LENGTH, 3, 7, 4, 6, 1)]
    rewards = rng.normal(size=len(completions)).tolist()
    initial = LlamaForCausalLM.from_pretrained(folder)
    engine = LlamaForCausalLM.from_pretrained(folder)
    move(engine, seed=1, by=0.1)  # a far too stale engine, so that weights are truncated
    with torch.no_grad():
        sampled, mask = token_logprobs(engine, completions)

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        logprobs = [row[m].tolist() for row, m in zip(sampled, mask)]
        return {
            "prompt_ids": [PROMPTS[i // GROUP] for i in range(len(completions))],
            "completion_ids": completions,
            "logprobs": logprobs,
        }

    config = GRPOConfig(
        str(tmp_path / "out"),
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.04,
        num_generations=GROUP,
        per_device_train_batch_size=len(completions),
        gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1.2,
        use_bias_correction_kl=False,  # by default it multiplies GRPO's KL by the ratio (DeepSeek-V3.2)
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    rows = [{"prompt": " ".join(f"w{t}" for t in PROMPTS[i // GROUP])} for i in range(len(completions))]
    trainer = trl.GRPOTrainer(
        folder,
        reward_funcs=lambda completions, **_: rewards,
        args=config,
        train_dataset=Dataset.from_list(rows),
        rollout_func=rollout,
    )
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step  # an engine, with nothing to load
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    move(model, seed=2)  # away from the reference
    old_model = LlamaForCausalLM.from_pretrained(folder)
    old_model.load_state_dict(model.state_dict())
    inputs = trainer._generate_and_score_completions(rows)
    move(model, seed=3)  # an update later
    expected = trainer._compute_loss(model, inputs)
    expected.backward()

    # Ours, from plain forward passes of the same weights.
    mine = LlamaForCausalLM.from_pretrained(folder)
    mine.load_state_dict(model.state_dict())
    with torch.no_grad():
        old, ref = token_logprobs(old_model, completions)[0], token_logprobs(initial, completions)[0]
    torch.testing.assert_close(old * mask, inputs["old_per_token_logps"] * mask, atol=1e-6, rtol=1e-5)
    weights = importance_weights(old, sampled, mask, 1.2)
    torch.testing.assert_close(weights * mask, inputs["importance_sampling_ratio"] * mask, atol=1e-6, rtol=1e-5)
    # TRL divides by the sample's standard deviation (G − 1), the GRPO paper and we by the population's (G).
    groups = np.split(np.array(rewards), 2)
    scale = [(g.std() + 1e-4) / (g.std(ddof=1) + 1e-4) for g in groups]
    ours = [a * s for a, s in zip(group_advantages(groups)[0], scale)]
    advantages = torch.tensor(np.concatenate(ours), dtype=torch.float32)
    torch.testing.assert_close(advantages, inputs["advantages"], atol=1e-6, rtol=1e-5)
    data = Batch(token_logprobs(mine, completions)[0], old, ref, sampled, advantages, mask)
    loss, stats = our_loss(data, "token", 0.2, 0.28, 0.04, True, cap=1.2)
    loss.backward()
    assert min(stats.clipped_low, stats.clipped_high, stats.truncated) > 0
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    theirs = dict(model.named_parameters())
    assert max(float(p.grad.abs().max()) for p in theirs.values()) > 1e-2
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)
