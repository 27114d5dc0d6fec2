"""Parity ladder of the thinker against plain transformers: prompt tokens, positions, log-probabilities. fp32.

The reference (plain.py) is the stock processor, the stock model called once per item, and log_softmax, with PEFT's own
model where there is an adapter. Models: the paper's Qwen2.5-VL and our Qwen3-VL, random, and the trained one shipped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import PlainModel
from samples import QUESTIONS, SIZES, frames, perturb_adapter, text_batch
from torch import Tensor

from actors.policy.settings import LoraSection
from actors.records import VideoQuestion, VlmExperience
from actors.vlm.policy import VlmPolicy
from pipeline.fleet.models import resolve_model

LORA = LoraSection(rank=8, alpha=32.0)
TOLERANCE = 1e-5
QWEN25 = "qwen2.5-vl"
CASES = [(QWEN25, False), (QWEN25, True), ("qwen3-vl", False), ("qwen3-vl", True), ("shipped", False)]


@pytest.fixture(scope="module")
def folders(tiny_vlm_dir: Path, tiny_qwen25_dir: Path) -> dict[str, str]:
    return {QWEN25: str(tiny_qwen25_dir), "qwen3-vl": str(tiny_vlm_dir), "shipped": resolve_model("tiny", "vlm")}


@pytest.fixture(scope="module")
def load(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """Our policy, with an adapter that changes the model where asked, and the plain model of the same weights."""

    def make(name: str, lora: bool) -> tuple[VlmPolicy, PlainModel]:
        if not lora:
            return VlmPolicy.load(folders[name]), PlainModel(folders[name])
        policy = VlmPolicy.load(folders[name], lora=LORA)
        perturb_adapter(policy.module, seed=1)
        adapter = tmp_path_factory.mktemp("adapter")
        policy.export(adapter)
        return policy, PlainModel(folders[name], adapter)

    return make


def completion(policy: VlmPolicy, seed: int, length: int) -> np.ndarray:
    """Random ordinary tokens, EOS last."""
    tokens = np.random.default_rng(seed).integers(0, 500, length - 1)
    return np.append(tokens, policy.eos_token_id).astype(np.int32)


def items_of(policy: VlmPolicy) -> list[VlmExperience]:
    """Completions of several lengths about videos of several sizes and frame rates."""
    items = []
    for i, ((count, height, width, fps), length) in enumerate(zip(SIZES, (6, 14, 1, 9))):
        video = np.random.default_rng(i).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        tokens = completion(policy, i, length)
        zeros = np.zeros(length, np.float32)
        items.append(VlmExperience(f"s{i}", i, VideoQuestion(QUESTIONS[i % 3], video, fps), tokens, zeros, 1.0))
    return items


def about(item: VlmExperience) -> tuple[str, np.ndarray, float]:
    """Return the question, frames and rate of ``item``, as the plain model takes them."""
    return item.asked.question, item.asked.frames, item.asked.fps


def ours(policy: VlmPolicy, items: list[VlmExperience]) -> list[Tensor]:
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
    assert out.logprobs[~out.mask].eq(0).all()
    return [row[mask] for row, mask in zip(out.logprobs, out.mask)]


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_video_logprobs_equal_plain_transformers_alone_and_padded(load, name: str, lora: bool) -> None:
    policy, plain = load(name, lora)
    items = items_of(policy)
    together = ours(policy, items)
    error = 0.0
    for item, row in zip(items, together, strict=True):
        expected = plain.logprobs(*about(item), item.token_ids, vllm_positions=name == QWEN25)
        (alone,) = ours(policy, [item])
        assert alone.shape == row.shape == expected.shape
        error = max(error, float((alone - expected).abs().max()), float((row - expected).abs().max()))
    print(f"{name}, LoRA {lora}: max error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_text_logprobs_equal_plain_transformers_alone_and_padded(load, name: str, lora: bool) -> None:
    """A question without a video. The policy's callers always have one, so the batch is put together here; positions,
    bans, temperature and normalisation are the policy's."""
    policy, plain = load(name, lora)
    completions = [completion(policy, 30 + i, length) for i, length in enumerate((7, 12, 1))]
    expected = [plain.logprobs(q, None, 8.0, c) for q, c in zip(QUESTIONS, completions)]
    prompts = [plain.prompt(q, None, 8.0)["input_ids"][0] for q in QUESTIONS]
    with torch.no_grad():
        out = policy.forward(text_batch(prompts, completions))
        for i, row in enumerate(expected):
            alone = policy.forward(text_batch(prompts[i : i + 1], completions[i : i + 1])).logprobs[0]
            assert (alone - row).abs().max() <= TOLERANCE
            assert (out.logprobs[i, : len(row)] - row).abs().max() <= TOLERANCE
            assert out.mask[i].sum() == len(row)


@pytest.mark.parametrize("name", [QWEN25, "qwen3-vl", "shipped"])
def test_prompt_tokens_pixels_and_positions_are_plain_transformers(load, name: str) -> None:
    """Qwen2.5-VL's text after the video is the exception: transformers puts it at max(h, w) // merge, whatever the
    video's length, and this test says where they part."""
    policy, plain = load(name, False)
    parted = []
    for item in items_of(policy):
        encoded = policy._prompts.encode([item.asked])[0]
        stock = plain.prompt(*about(item))
        assert torch.equal(encoded.input_ids, stock["input_ids"][0])
        assert torch.equal(encoded.visual["pixel_values_videos"], stock["pixel_values_videos"])
        assert torch.equal(encoded.visual["video_grid_thw"], stock["video_grid_thw"])
        assert torch.equal(encoded.positions, plain.positions_after_the_video(stock)[:, 0])
        assert encoded.next_position == int(encoded.positions.max()) + 1
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
        theirs, _ = plain.core.get_rope_index(**{n: stock[n] for n in names if n in stock})
        after = int((encoded.input_ids == plain.processor.video_token_id).nonzero()[-1]) + 1
        assert torch.equal(encoded.positions[:, :after], theirs[:, 0, :after])
        parted.append(not torch.equal(encoded.positions, theirs[:, 0]))
    longer = [True, False, True, False]  # than it is wide: not the one of 2 frames, nor that of 5 shown at 24 a second
    assert parted == (longer if name == QWEN25 else [False] * 4)


def test_qwen25_stock_positions_would_be_seen(load) -> None:
    """The correction matters: with transformers' positions the log-probabilities are off by orders of magnitude more."""
    policy, plain = load(QWEN25, False)
    item = items_of(policy)[2]
    stock = plain.logprobs(*about(item), item.token_ids)
    assert (ours(policy, [item])[0] - stock).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_plain_logits(folders: dict[str, str], temperature: float) -> None:
    policy, plain = VlmPolicy.load(folders["qwen3-vl"], temperature=temperature), PlainModel(folders["qwen3-vl"])
    item = items_of(policy)[0]
    expected = plain.logprobs(*about(item), item.token_ids, temperature)
    assert (ours(policy, [item])[0] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [QWEN25, "qwen3-vl"])
def test_disabled_adapter_is_bitwise_the_base_model(load, folders: dict[str, str], name: str) -> None:
    """The reference policy: its log-probabilities are those of the model without an adapter, and of the stock model's
    logits, bit for bit."""
    policy, _ = load(name, True)
    base, items = VlmPolicy.load(folders[name]), items_of(policy)
    flags = [p.requires_grad for p in policy.module.parameters()]
    with policy.reference():
        reference = ours(policy, items)
        batch = policy.collate(items)
        with torch.no_grad():
            logits = policy.module(**batch.model_inputs).logits
    assert all(torch.equal(a, b) for a, b in zip(reference, ours(base, items), strict=True))
    with torch.no_grad():
        assert torch.equal(logits, PlainModel(folders[name]).model(**batch.model_inputs).logits)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(reference, ours(policy, items), strict=True))
    assert flags == [p.requires_grad for p in policy.module.parameters()]
    with pytest.raises(ValueError, match="LoRA"), base.reference():
        pass


def test_fresh_adapter_is_bitwise_the_base_model(folders: dict[str, str]) -> None:
    """Training starts from the base model: lora_B is zero."""
    for name in (QWEN25, "qwen3-vl"):
        fresh, base = VlmPolicy.load(folders[name], lora=LORA), VlmPolicy.load(folders[name])
        items = items_of(base)
        assert all(torch.equal(a, b) for a, b in zip(ours(fresh, items), ours(base, items), strict=True))


def test_ratio_of_two_passes_is_exactly_one(load) -> None:
    """What the ratio gate rests on: old and new log-probabilities of one policy are equal bit for bit."""
    policy, _ = load("qwen3-vl", True)
    items = items_of(policy)
    first, second = policy.forward(policy.collate(items)), policy.forward(policy.collate(items))
    assert first.logprobs.requires_grad and torch.exp(first.logprobs - second.logprobs).eq(1).all()


def test_frames_of_the_samples_reach_the_model(load) -> None:
    """The video is no decoration: another one changes every log-probability."""
    policy, _ = load("shipped", False)
    item = items_of(policy)[0]
    other = replace(item, asked=replace(item.asked, frames=frames(99)))
    assert (ours(policy, [item])[0] - ours(policy, [other])[0]).abs().max() > 1e-3
