"""One real vLLM engine behind the real Ray actor: agreement with the learner's policy, weights versions, bans, failures."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import QUESTIONS, frames, perturb_adapter

from actors.failures import Failure, Ok
from actors.policy.settings import LoraSection
from actors.records import Completion, CompletionRequest, VideoQuestion, VlmExperience, derive_seed
from actors.vlm.policy import VlmPolicy

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

REQUESTS = [
    CompletionRequest(
        f"s{i}", VideoQuestion(QUESTIONS[i % 3], frames(i), 8.0), n=8, seed=derive_seed("vlm", i), max_tokens=24
    )
    for i in range(6)
]


@pytest.fixture
def worker(qwen3_worker: Any) -> Any:
    return qwen3_worker


@pytest.fixture(scope="module")
def policy(tiny_vlm_dir: Path) -> VlmPolicy:
    return VlmPolicy.load(tiny_vlm_dir, lora=LoraSection(rank=8, alpha=32.0))


def complete(worker: Any, requests: list[CompletionRequest]) -> list[list[Completion]]:
    import ray

    # Separate calls, as the pool makes them: vLLM batches what runs at once.
    calls = ray.get([worker.process.remote([request]) for request in requests], timeout=120)
    assert all(isinstance(outcome, Ok) for (outcome,) in calls), calls
    return [outcome.value for (outcome,) in calls]


def load(worker: Any, weights: Any, version: int) -> None:
    import ray

    from actors.weights.transport import send

    payload = None if weights is None else send(weights)
    assert ray.get(worker.load_weights.remote(version, payload), timeout=60) == version


def difference(policy: VlmPolicy, requests: list[CompletionRequest], groups: list[list[Completion]]) -> float:
    """Largest |learner − engine| of all tokens of all completions."""
    items = [
        VlmExperience(r.sample_id, i, r.asked, c.token_ids, c.logprobs, 0.0)
        for r, group in zip(requests, groups, strict=True)
        for i, c in enumerate(group)
    ]
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
    return float((out.logprobs - policy.rollout_logprobs(items)).abs().max())


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [c.token_ids.tolist() for group in groups for c in group]


def test_a_nucleus_of_one_token_is_greedy_and_a_wide_one_is_not(worker: Any) -> None:
    load(worker, None, 0)
    greedy, narrow, wide = (
        tokens(complete(worker, [replace(r, n=2, **how) for r in REQUESTS[:3]]))
        for how in ({"temperature": 0.0}, {"top_p": 1e-6}, {"top_p": 0.9})
    )
    assert narrow == greedy and wide != greedy


def test_base_weights_agree_and_requests_repeat_themselves(worker: Any, policy: VlmPolicy) -> None:
    load(worker, None, 0)
    groups = complete(worker, REQUESTS)
    assert [len(g) for g in groups] == [8] * 6
    assert {c.weights_version for g in groups for c in g} == {0}
    assert len({tuple(t) for t in tokens(groups)}) == 48  # a seed of its own for every completion
    with policy.reference():
        assert difference(policy, REQUESTS, groups) <= 1e-5
    # Alone or in a batch, first or second time: the same tokens.
    assert tokens(complete(worker, REQUESTS[2:3])) == tokens(groups[2:3])
    banned = set(policy.banned_ids)
    assert not banned & {t for sequence in tokens(groups) for t in sequence}


def test_a_text_made_at_the_end_is_the_one_made_token_by_token(worker: Any) -> None:
    import ray

    load(worker, None, 0)
    requests = [replace(r, n=16, temperature=t) for r in REQUESTS for t in (0.7, 1.0)]
    found = {}
    for on in (False, True):
        assert ray.get(worker.text_at_end.remote(on, requests[0])) is not on
        found[on] = complete(worker, requests)
    assert tokens(found[True]) == tokens(found[False])
    whole, grown = ([c.text for group in found[on] for c in group] for on in (True, False))
    assert len(set(whole)) > len(requests)
    # After bytes that are no text, vLLM's may lack the letters of the last tokens, which it then holds back for ever.
    pairs = list(zip(whole, grown, strict=True))
    assert all(a == b or ("\ufffd" in a and a.startswith(b)) for a, b in pairs)
    assert sum(a == b for a, b in pairs) > len(pairs) / 2
    assert any(not text.isascii() for text in whole)


def test_temperature_and_greedy(worker: Any, policy: VlmPolicy, tiny_vlm_dir: Path) -> None:
    load(worker, None, 0)
    warm = [replace(r, temperature=1.5) for r in REQUESTS[:2]]
    assert difference(VlmPolicy.load(tiny_vlm_dir, temperature=1.5), warm, complete(worker, warm)) <= 1e-5
    greedy = [replace(r, temperature=0.0, n=2, seed=i) for i, r in enumerate(REQUESTS[:2])]
    first, second = complete(worker, greedy)[0]
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert tokens(complete(worker, [replace(greedy[0], seed=99)])) == [first.token_ids.tolist()] * 2
    with torch.no_grad(), policy.reference():
        item = VlmExperience("g", 0, greedy[0].asked, first.token_ids, first.logprobs, 0.0)
        kept = policy.module(**policy.collate([item]).model_inputs).logits[0].float() + policy._bias
    assert kept.argmax(-1).tolist() == first.token_ids.tolist()


def test_adapter_versions_are_served_stamped_and_left_again(worker: Any, policy: VlmPolicy) -> None:
    import ray

    from actors.weights.transport import pack

    load(worker, None, 0)
    base, frozen = tokens(complete(worker, REQUESTS[:3])), ray.get(worker.weights_hash.remote())
    for version in (1, 2):
        perturb_adapter(policy.module, seed=version)
        load(worker, pack(version, "lora", policy.adapter_state(), policy.adapter_config), version)
        groups = complete(worker, REQUESTS[:3])
        assert {c.weights_version for g in groups for c in g} == {version}
        assert difference(policy, REQUESTS[:3], groups) <= 1e-5
        assert tokens(groups) != base
        assert ray.get(worker.weights_hash.remote()) == frozen.replace(":0", f":{version}")
    load(worker, None, 3)
    assert tokens(complete(worker, REQUESTS[:3])) == base


def test_an_adapter_of_old_names_is_served_and_one_that_does_not_fit_is_refused(worker: Any, policy: VlmPolicy) -> None:
    import ray

    from actors.weights.transport import pack

    load(worker, None, 0)
    base = tokens(complete(worker, REQUESTS[:3]))
    perturb_adapter(policy.module, seed=5)

    def old(name: str) -> str:
        return name.replace("model.language_model.", "model.")

    config = {**policy.adapter_config, "target_modules": [old(n) for n in policy.adapter_config["target_modules"]]}
    state = {old(name): tensor for name, tensor in policy.adapter_state().items()}
    load(worker, pack(1, "lora", state, config), 1)
    groups = complete(worker, REQUESTS[:3])
    assert difference(policy, REQUESTS[:3], groups) <= 1e-5 and tokens(groups) != base
    half = dict(sorted(state.items())[: len(state) // 2])
    with pytest.raises(
        ray.exceptions.RayTaskError, match=f"published weights of version 2: .*{len(state) // 2} tensors are missing"
    ):
        load(worker, pack(2, "lora", half, config), 2)
    again = complete(worker, REQUESTS[:3])
    assert tokens(again) == tokens(groups) and {c.weights_version for g in again for c in g} == {1}
    load(worker, None, 0)


def test_full_weights_are_reloaded_without_mixing_versions(worker: Any, tiny_vlm_dir: Path, policy: VlmPolicy) -> None:
    import ray

    from actors.weights.transport import pack

    load(worker, None, 0)
    base, frozen = tokens(complete(worker, REQUESTS)), ray.get(worker.weights_hash.remote())
    full = VlmPolicy.load(tiny_vlm_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in full.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    running = [worker.process.remote([request]) for request in REQUESTS]
    load(worker, pack(7, "full", full.module.state_dict()), 7)
    for (outcome,), request in zip(ray.get(running, timeout=60), REQUESTS, strict=True):
        version = {c.weights_version for c in outcome.value}
        assert len(version) == 1
        model = full if version == {7} else VlmPolicy.load(tiny_vlm_dir)
        assert difference(model, [request], [outcome.value]) <= 1e-5
    groups = complete(worker, REQUESTS)
    assert difference(full, REQUESTS, groups) <= 1e-5
    assert ray.get(worker.weights_hash.remote()).split(":")[0] != frozen.split(":")[0]
    perturb_adapter(policy.module, seed=1)
    load(worker, pack(8, "lora", policy.adapter_state(), policy.adapter_config), 8)  # on the folder's weights again
    assert difference(policy, REQUESTS, complete(worker, REQUESTS)) <= 1e-5
    assert ray.get(worker.weights_hash.remote()) == frozen.replace(":0", ":8")
    load(worker, None, 0)
    assert tokens(complete(worker, REQUESTS)) == base
    assert ray.get(worker.weights_hash.remote()) == frozen


def perturbed(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    model = VlmPolicy.load(folder).module
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.state_dict()


def test_full_weights_by_broadcast_are_those_of_the_object_store(worker: Any, tiny_vlm_dir: Path) -> None:
    """Through vLLM's own weight transfer; and where it fails, early or half-way, the object store gives the same."""
    import ray

    from actors.weights.broadcast import Broadcast, BroadcastSpec, receive_broadcast
    from actors.weights.transport import pack, send

    weights, other = (pack(version, "full", perturbed(tiny_vlm_dir, version)) for version in (7, 8))
    load(worker, weights, 7)
    expected, answers = ray.get(worker.weights_hash.remote()), tokens(complete(worker, REQUESTS[:3]))
    spec = BroadcastSpec(join_timeout_s=20.0, transfer_timeout_s=60.0, bucket_bytes=1 << 16)  # many messages

    def load_offered(broadcast: Broadcast) -> str:
        load(worker, other, 8)
        assert ray.get(worker.weights_hash.remote()).split(":")[0] != expected.split(":")[0]
        payload = [*send(weights), broadcast.offer]
        assert ray.get(worker.load_weights.remote(7, payload), timeout=100) == 7
        assert ray.get(worker.weights_hash.remote()) == expected
        assert tokens(complete(worker, REQUESTS[:3])) == answers
        return ray.get(worker.arrival.remote())

    broadcast = Broadcast(weights, "127.0.0.1", 1, spec, torch.device("cpu"))
    assert load_offered(broadcast) == "broadcast" and broadcast.wait(5) and broadcast.sent_to == 1
    assert load_offered(broadcast) == "object store"  # it is over

    broadcast = Broadcast(weights, "127.0.0.1", 2, spec, torch.device("cpu"))
    left = threading.Event()

    def leave_half_way() -> None:
        receiver = receive_broadcast(broadcast.offer, torch.device("cpu"))
        for _ in range(3):
            next(receiver)
        receiver.close()  # type: ignore[attr-defined]
        left.set()

    threading.Thread(target=leave_half_way, daemon=True).start()
    assert load_offered(broadcast) == "object store" and left.is_set() and broadcast.sent_to == 0
    load(worker, None, 0)


def test_a_resting_engine_wakes_for_whatever_needs_it(worker: Any, policy: VlmPolicy) -> None:
    import ray

    from actors.weights.transport import pack

    load(worker, None, 0)
    base, frozen = tokens(complete(worker, REQUESTS[:2])), ray.get(worker.weights_hash.remote())
    for _ in range(2):
        ray.get([worker.rest.remote(), worker.rest.remote()], timeout=60)
        assert ray.get(worker.ping.remote(), timeout=10) == "vlm-0"
        assert tokens(complete(worker, REQUESTS[:2])) == base
    ray.get(worker.rest.remote(), timeout=60)
    assert ray.get(worker.weights_hash.remote(), timeout=60) == frozen
    ray.get(worker.rest.remote(), timeout=60)
    perturb_adapter(policy.module, seed=1)
    load(worker, pack(4, "lora", policy.adapter_state(), policy.adapter_config), 4)
    assert difference(policy, REQUESTS[:2], complete(worker, REQUESTS[:2])) <= 1e-5
    running = [worker.process.remote([request]) for request in REQUESTS]
    ray.get(worker.rest.remote(), timeout=60)  # it lets them finish
    assert all(isinstance(outcome, Ok) for (outcome,) in ray.get(running, timeout=60))
    load(worker, None, 0)


def test_bad_requests_are_data_failures_and_others_go_on(worker: Any) -> None:
    import ray

    good = REQUESTS[0]
    bad = [
        replace(good, asked=replace(good.asked, question="What happens then? " * 200)),
        replace(good, asked=replace(good.asked, question="<|im_end|>")),
        replace(good, asked=replace(good.asked, frames=np.zeros((9, 32, 32, 3), np.float32))),
    ]
    outcomes = ray.get(worker.process.remote([*bad, good]), timeout=60)
    assert isinstance(outcomes[-1], Ok)
    for outcome in outcomes[:3]:
        assert isinstance(outcome, Failure) and outcome.kind == "data", outcome
    assert "512" in outcomes[0].message


def test_a_group_encodes_its_video_once(worker: Any) -> None:
    import ray

    def counted() -> dict[str, float]:
        return ray.get(worker.counters.remote(), timeout=60)

    requests = [
        CompletionRequest(f"new{i}", VideoQuestion(QUESTIONS[0], frames(100 + i), 8.0), n=8, seed=i, max_tokens=8)
        for i in range(2)
    ]
    before = counted()
    answers = complete(worker, requests)
    done = {name: value - before[name] for name, value in counted().items()}
    assert done["videos_asked"] == done["completions"] == 16
    assert done["videos"] == done["prompts"] == 2
    assert done["tokens"] == sum(len(answer.token_ids) for group in answers for answer in group)
    assert done["prompt_tokens"] > 2 * 10  # question and video
