"""The VLM policy as the learner uses it: KL, entropy, what trains, adapters that are PEFT's, SFT, prompts, refusals.

Its log-probabilities against plain transformers and vLLM: test_parity_transformers.py, test_parity_vllm_ray.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import PlainModel
from samples import QUESTIONS, experience, frames, perturb_adapter

from actors.failures import BadSampleError
from actors.policy.protocol import Trainable, trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import VideoQuestion, VlmExperience
from actors.vlm.policy import VlmPolicy
from actors.vlm.positions import mrope_positions
from actors.vlm.prompt import render_prompt
from cluster.errors import CheckpointError
from rewards.format import parse_answer

LORA = LoraSection(rank=8, alpha=32.0)


@pytest.fixture(scope="module")
def policy(tiny_vlm_dir: Path) -> VlmPolicy:
    """A policy whose adapter changes the model."""
    policy = VlmPolicy.load(tiny_vlm_dir, lora=LORA)
    perturb_adapter(policy.module, seed=1)
    return policy


@pytest.fixture(scope="module")
def items(policy: VlmPolicy) -> list[VlmExperience]:
    return [experience(i, length, policy.eos_token_id) for i, length in enumerate((5, 12, 1, 8))]


def padded(policy: VlmPolicy, items: list[VlmExperience]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
    return out.logprobs, out.mask


def test_kl_is_the_k3_estimate_and_entropy_is_of_the_allowed_tokens(
    policy: VlmPolicy, items: list[VlmExperience]
) -> None:
    batch = policy.collate(items)
    out = policy.forward(batch)
    with torch.no_grad(), policy.reference():
        ref = policy.forward(batch)
    delta = ref.logprobs - out.logprobs
    kl = policy.kl(out, ref)
    exact = delta.double()
    torch.testing.assert_close(kl[out.mask].double(), (exact.exp() - exact - 1)[out.mask], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(policy.kl(out, ref, "k2"), torch.where(out.mask, delta**2 / 2, 0.0))
    torch.testing.assert_close(policy.kl(out, ref, "k1"), torch.where(out.mask, -delta, 0.0))
    assert (kl >= 0).all() and kl[~out.mask].eq(0).all()
    assert out.entropy is not None
    allowed = policy._bias.numel() - len(policy.banned_ids)
    assert 0 < out.entropy[out.mask].max() <= np.log(allowed)


def test_only_the_language_models_adapter_trains(policy: VlmPolicy) -> None:
    assert isinstance(policy, Trainable)
    names = [n for n, p in policy.module.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2  # two layers, seven projections, A and B
    assert all("language_model" in n and ".lora_" in n for n in names)
    assert len(trainable_parameters(policy.module)) == len(names)


def test_lora_init_is_seeded(tiny_vlm_dir: Path) -> None:
    one, two = VlmPolicy.load(tiny_vlm_dir, lora=LORA), VlmPolicy.load(tiny_vlm_dir, lora=LORA)
    for a, b in zip(one.adapter_state().values(), two.adapter_state().values(), strict=True):
        assert torch.equal(a, b)


def test_export_is_an_adapter_that_peft_and_we_load(
    tmp_path: Path, tiny_vlm_dir: Path, policy: VlmPolicy, items: list[VlmExperience]
) -> None:
    policy.export(tmp_path / "adapter")
    peft, item = PlainModel(tiny_vlm_dir, tmp_path / "adapter"), items[0]
    ours, _ = padded(policy, [item])
    expected = peft.logprobs(item.asked.question, item.asked.frames, item.asked.fps, item.token_ids)
    assert (expected - ours[0]).abs().max() <= 1e-5
    again = VlmPolicy.load(tiny_vlm_dir, adapter=tmp_path / "adapter", lora=LORA)
    assert torch.equal(padded(again, items)[0], padded(policy, items)[0])
    with pytest.raises(CheckpointError, match="rank 8"):
        VlmPolicy.load(tiny_vlm_dir, adapter=tmp_path / "adapter", lora=LORA.model_copy(update={"rank": 4}))


def test_full_export_loads_as_a_model(tmp_path: Path, tiny_vlm_dir: Path, items: list[VlmExperience]) -> None:
    full = VlmPolicy.load(tiny_vlm_dir)
    assert all(p.requires_grad for p in full.module.parameters())
    full.export(tmp_path / "model")
    assert torch.equal(padded(VlmPolicy.load(tmp_path / "model"), items)[0], padded(full, items)[0])


def test_sft_loss_falls(tiny_vlm_dir: Path) -> None:
    policy = VlmPolicy.load(tiny_vlm_dir)
    answer = "<think> the ball fell </think><ans> the ball rises </ans>"
    asked = [VideoQuestion(QUESTIONS[i], frames(i), 8.0) for i in range(2)]
    batch = list(zip(asked, (answer, answer.replace("rises", "fades")), strict=True))
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = policy.sft_loss(batch)
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
        losses.append(loss.metrics["loss"])
    assert losses[-1] < 0.7 * losses[0]
    tokens = policy.answer_tokens(answer)
    assert tokens[-1] == policy.eos_token_id
    assert parse_answer(policy.processor.tokenizer.decode(tokens[:-1])).caption == "the ball rises"


def test_equal_prompts_are_processed_once(policy: VlmPolicy, items: list[VlmExperience]) -> None:
    seen: list[VideoQuestion] = []
    encoder = policy._prompts
    process = encoder._process
    encoder._process = lambda asked: seen.append(asked) or process(asked)  # type: ignore[method-assign,func-returns-value]
    fresh = experience(77, 4, policy.eos_token_id)
    policy.collate([fresh] * 4 + items[:1])
    policy.collate([fresh])
    del encoder._process
    assert seen == [fresh.asked]


def test_text_after_a_long_qwen25_video_starts_after_its_last_position() -> None:
    types = torch.tensor([0, 0] + [2] * 8 + [0, 0])
    positions, following = mrope_positions(types, torch.tensor([[2, 4, 4]]), merge=2, time_interval=25.0)
    assert positions[0].tolist() == [0, 1] + [2] * 4 + [27] * 4 + [28, 29]
    assert positions[1].tolist() == [0, 1] + [2, 2, 3, 3] * 2 + [28, 29]
    assert positions[2].tolist() == [0, 1] + [2, 3, 2, 3] * 2 + [28, 29]
    assert following == 30


def test_prompt_has_one_video_and_refuses_special_tokens(policy: VlmPolicy) -> None:
    text = render_prompt(policy.processor, "What now?")
    assert text.count("<|vision_start|><|video_pad|><|vision_end|>") == 1 and text.endswith("assistant\n")
    with pytest.raises(BadSampleError, match="video_pad"):
        render_prompt(policy.processor, "What <|video_pad|> now?")
    with pytest.raises(BadSampleError, match="empty"):
        render_prompt(policy.processor, "  ")


def test_unusable_frames_settings_and_folders_are_named(
    policy: VlmPolicy, tiny_vlm_dir: Path, tmp_path: Path, items: list[VlmExperience]
) -> None:
    for bad in (frames(0)[:1], frames(0).astype(np.float32), frames(0)[:, :0]):
        with pytest.raises(BadSampleError, match="frame"):
            policy.collate([replace(items[0], asked=replace(items[0].asked, frames=bad))])
    with pytest.raises(BadSampleError, match="empty"):
        policy.collate([replace(items[0], token_ids=np.array([], np.int32))])
    with pytest.raises(ValueError, match="temperature"):
        VlmPolicy.load(tiny_vlm_dir, temperature=0.0)
    with pytest.raises(CheckpointError, match="cannot load a VLM"):
        VlmPolicy.load(tmp_path / "nothing")
