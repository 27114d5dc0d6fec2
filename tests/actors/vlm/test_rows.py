"""A prompt read once for all its completions gives what separate rows give: log-probabilities, gradients, and no view of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import QUESTIONS, experience, frames, perturb_adapter

from actors.policy.settings import LoraSection
from actors.records import VideoQuestion, VlmExperience
from actors.vlm.policy import VlmPolicy

LENGTHS = ((5, 12, 1), (8,), (3, 7))  # completions of three prompts, of other sizes
VIDEOS = ((9, 32), (2, 48), (17, 32))


def groups(eos: int) -> list[VlmExperience]:
    """Completions of three prompts, in turn rather than prompt by prompt."""
    found = []
    for prompt, lengths in enumerate(LENGTHS):
        for i, length in enumerate(lengths):
            item = experience(10 * prompt + i, length, eos)
            found.append(
                (
                    i,
                    replace(
                        item,
                        sample_id=f"p{prompt}",
                        asked=VideoQuestion(QUESTIONS[prompt], frames(prompt, *VIDEOS[prompt]), 8.0),
                    ),
                )
            )
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl"])
def folder(request: pytest.FixtureRequest, tiny_vlm_dir: Path, tiny_qwen25_dir: Path) -> Path:
    return tiny_vlm_dir if request.param == "qwen3-vl" else tiny_qwen25_dir


def load(folder: Path, shared: bool, lora: bool = True) -> VlmPolicy:
    policy = VlmPolicy.load(folder, lora=LoraSection(rank=8, alpha=32.0) if lora else None, shared_prompts=shared)
    if lora:
        perturb_adapter(policy.module, seed=1)
    return policy


@pytest.mark.parametrize("lora", [True, False])
def test_shared_and_separate_prompts_agree(folder: Path, lora: bool) -> None:
    seen = []
    for shared in (True, False):
        policy = load(folder, shared, lora)
        items = groups(policy.eos_token_id)
        batch = policy.collate(items)
        out = policy.forward(batch)
        assert out.entropy is not None and len(out.logprobs) == len(items)
        weights = torch.randn(out.logprobs.shape, generator=torch.Generator().manual_seed(0))
        (out.logprobs * weights).sum().backward()
        gradients = {n: p.grad for n, p in policy.module.named_parameters() if p.grad is not None}
        with torch.no_grad(), policy.reference() if lora else torch.no_grad():
            reference = policy.forward(batch)
        seen.append((batch, out, gradients, reference))
    (ours, one, mine, base), (theirs, other, its, plain) = seen
    assert len(ours.model_inputs["input_ids"]) == len(LENGTHS) and len(theirs.model_inputs["input_ids"]) == 6
    assert len(ours.model_inputs["video_grid_thw"]) == len(LENGTHS)
    assert torch.equal(one.mask, other.mask) and torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.entropy, other.entropy, rtol=0, atol=1e-5)
    torch.testing.assert_close(base.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    assert mine.keys() == its.keys()
    scale = max(float(g.abs().max()) for g in its.values())
    for name, gradient in its.items():
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_completion_does_not_see_those_beside_it(folder: Path) -> None:
    policy = load(folder, True)
    items = groups(policy.eos_token_id)
    changed = [
        replace(i, token_ids=(i.token_ids + 1) % 500) if (i.sample_id, len(i.token_ids)) == ("p0", 12) else i
        for i in items
    ]
    with torch.no_grad():
        before, after = (policy.forward(policy.collate(batch)).logprobs for batch in (items, changed))
    same = torch.tensor([a is b for a, b in zip(items, changed, strict=True)])
    assert same.sum() == len(items) - 1
    assert torch.equal(before[same], after[same]) and not torch.equal(before[~same], after[~same])


def test_one_completion_of_each_prompt_is_left_as_it_was(folder: Path) -> None:
    """Nothing is shared, so the model makes its own causal mask, and both are the same bits."""
    results = []
    for shared in (True, False):
        policy = load(folder, shared)
        items = [i for i in groups(policy.eos_token_id) if len(i.token_ids) in (5, 8, 3)]
        batch = policy.collate(items)
        assert batch.model_inputs["attention_mask"].shape == batch.model_inputs["input_ids"].shape
        with torch.no_grad():
            results.append(policy.forward(batch).logprobs)
    assert torch.equal(*results)


def test_a_sliding_window_keeps_rows_apart(folder: Path) -> None:
    policy = load(folder, True)
    model = policy.module
    model.model.language_model.has_sliding_layers = True
    windowed = VlmPolicy(model, policy.processor)
    batch = windowed.collate(groups(policy.eos_token_id))
    assert len(batch.model_inputs["input_ids"]) == 6
    assert np.array_equal(batch.rows.numpy(), np.arange(6))
