"""Parity ladder of the thinker against vLLM: what the engine says of the tokens it sampled, and what the policy says.

Two real engines behind the real Ray actor, on the paper's Qwen2.5-VL and our Qwen3-VL (random, fp32): prompts with a
video and of text alone, one at a time and in padded batches, adapter on and off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain import PlainModel
from samples import QUESTIONS, SIZES, perturb_adapter, text_batch

from actors.failures import Ok
from actors.policy.settings import LoraSection
from actors.records import CompletionRequest, VideoQuestion, VlmExperience, derive_seed
from actors.vlm.policy import VlmPolicy
from actors.weights.transport import pack, send

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
TOLERANCE = 1e-5
MODELS = ("qwen2.5-vl", "qwen3-vl")


def request_of(i: int, temperature: float) -> CompletionRequest:
    count, height, width, fps = SIZES[i]
    video = np.random.default_rng(50 + i).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    seed = derive_seed("parity", i)
    return CompletionRequest(
        f"s{i}", VideoQuestion(QUESTIONS[i % 3], video, fps), 3, seed, temperature, max_tokens=6 + 9 * i
    )


@pytest.fixture(scope="module")
def start(request: pytest.FixtureRequest) -> Any:
    """The engine of a model with an adapter or the base weights loaded, our policy in the same state, and its folder."""
    import ray

    fixtures = {"qwen2.5-vl": ("qwen25_worker", "tiny_qwen25_dir"), "qwen3-vl": ("qwen3_worker", "tiny_vlm_dir")}

    def make(name: str, lora: bool, temperature: float = 1.0) -> tuple[Any, VlmPolicy, PlainModel]:
        worker, folder = (request.getfixturevalue(fixture) for fixture in fixtures[name])
        policy = VlmPolicy.load(folder, lora=LoraSection(rank=8, alpha=32.0) if lora else None, temperature=temperature)
        payload = None
        if lora:
            perturb_adapter(policy.module, seed=4)
            payload = send(pack(1, "lora", policy.adapter_state(), policy.adapter_config))
        ray.get(worker.load_weights.remote(int(lora), payload), timeout=60)
        return worker, policy, PlainModel(folder)

    return make


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("lora", [False, True], ids=["base", "LoRA"])
@pytest.mark.parametrize("name", MODELS)
def test_video_logprobs_equal_vllms_alone_and_padded(start: Any, name: str, lora: bool, temperature: float) -> None:
    import ray

    worker, policy, _ = start(name, lora, temperature)
    requests = [request_of(i, temperature) for i in range(len(SIZES))]
    outcomes = ray.get([worker.process.remote([request]) for request in requests], timeout=120)
    items = []
    for request, (outcome,) in zip(requests, outcomes, strict=True):
        assert isinstance(outcome, Ok), outcome
        for i, c in enumerate(outcome.value):
            items.append(VlmExperience(request.sample_id, i, request.asked, c.token_ids, c.logprobs, 0.0))
    engine = policy.rollout_logprobs(items)
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
        alone = [policy.forward(policy.collate([item])).logprobs[0] for item in items]
    assert len(items) == 12 and len({len(item.token_ids) for item in items}) > 2 and (engine[out.mask] < 0).all()
    errors = [float((out.logprobs - engine).abs().max())]
    errors += [float((row - engine[i, : len(row)]).abs().max()) for i, row in enumerate(alone)]
    print(
        f"{name}, LoRA {lora}, temperature {temperature}: max error {max(errors):.1e} over {int(out.mask.sum())} tokens"
    )
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("lora", [False, True], ids=["base", "LoRA"])
@pytest.mark.parametrize("name", MODELS)
def test_text_logprobs_equal_vllms_alone_and_padded(start: Any, name: str, lora: bool) -> None:
    """A question without a video, past the worker's own check that there is one."""
    import ray

    worker, policy, plain = start(name, lora)
    prompts = [plain.prompt(question, None, 8.0)["input_ids"][0] for question in QUESTIONS]
    texts = [plain.processor.tokenizer.decode(prompt) for prompt in prompts]
    calls = [worker.complete_text.remote(text, request_of(i, 1.0)) for i, text in enumerate(texts)]
    pairs = [(p, *c) for p, group in zip(prompts, ray.get(calls, timeout=60)) for c in group]
    ids = [np.array(tokens) for _, tokens, _ in pairs]
    batches = [text_batch([p for p, _, _ in pairs], ids)]
    batches += [text_batch([p], [tokens]) for (p, _, _), tokens in zip(pairs, ids)]
    with torch.no_grad():
        together, *alone = (policy.forward(batch).logprobs for batch in batches)
    for i, (_, tokens, engine) in enumerate(pairs):
        for row in (together[i, : len(tokens)], alone[i][0]):
            assert (row - torch.tensor(engine)).abs().max() <= TOLERANCE
    assert len(pairs) == 9


def test_qwen25_video_positions_are_vllms(start: Any) -> None:
    """The prompt's rotary positions as vLLM's model computes them while it serves, and as the policy does."""
    import ray

    worker, policy, _ = start("qwen2.5-vl", False)
    ray.get(worker.positions.remote(), timeout=60)
    for i in range(len(SIZES)):
        request = request_of(i, 1.0)
        (outcome,) = ray.get(worker.process.remote([request]), timeout=60)
        assert isinstance(outcome, Ok)
        tokens, positions = ray.get(worker.positions.remote(), timeout=60)[-1]
        encoded = policy._prompts.encode([request.asked])[0]
        length = len(encoded.input_ids)
        assert tokens[:length] == encoded.input_ids.tolist()
        assert np.array_equal(positions[:, :length], encoded.positions.numpy())


def test_qwen25_stock_positions_would_be_seen(start: Any) -> None:
    """What the engine samples after a long video, scored by transformers with its own positions, is far off."""
    import ray

    worker, _, plain = start("qwen2.5-vl", False)
    request = request_of(2, 1.0)
    (outcome,) = ray.get(worker.process.remote([request]), timeout=60)
    for completion in outcome.value:
        asked = request.asked
        about = (asked.question, asked.frames, asked.fps, completion.token_ids)
        engine = torch.from_numpy(np.array(completion.logprobs))
        assert (plain.logprobs(*about, vllm_positions=True) - engine).abs().max() <= TOLERANCE
        assert (plain.logprobs(*about) - engine).abs().max() > 100 * TOLERANCE
