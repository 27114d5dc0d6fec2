"""Parity of other makes of thinker with vLLM: what the engine says of the tokens it sampled, and what the policy says.

The engine runs in this process, so that one import of vLLM serves all of them. float32, random weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import QUESTIONS, SIZES, perturb_adapter
from thinkers import build_tiny_glm4v, build_tiny_internvl

from actors.policy.settings import LoraSection
from actors.records import CompletionRequest, VideoQuestion, VlmExperience
from actors.vlm.engine import VlmEngine
from actors.vlm.engine_args import EngineSpec
from actors.vlm.policy import VlmPolicy
from actors.vlm.settings import VlmPoolSection
from actors.weights.transport import pack

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
BUILDERS = {"internvl": build_tiny_internvl, "glm4v": build_tiny_glm4v}
LORA = LoraSection(rank=8, alpha=32.0)
BASE_TOLERANCE, LORA_TOLERANCE = 1e-5, 5e-5


class Engine:
    """A real engine on one folder, and the event loop that it lives in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loop = folder, asyncio.new_event_loop()
        settings = VlmPoolSection(kv_cache_mib=64, max_model_len=1024)
        self.engine = VlmEngine(EngineSpec(str(folder), settings, lora_rank=8, in_process=True))
        self.run(self.engine.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.engine.close()
        self.loop.close()

    def sampled(self, temperature: float = 1.0) -> list[VlmExperience]:
        """Two completions about each of several videos, all asked at once."""
        requests = []
        for i, (count, height, width, fps) in enumerate(SIZES):
            video = np.random.default_rng(50 + i).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
            asked = VideoQuestion(QUESTIONS[i % 3], video, fps)
            requests.append(CompletionRequest(f"s{i}", asked, 2, 7 + i, temperature, max_tokens=5 + 4 * i))

        async def together() -> list[Any]:
            return await asyncio.gather(*(self.engine.generate(request) for request in requests))

        return [
            VlmExperience(r.sample_id, k, r.asked, c.token_ids, c.logprobs, 0.0)
            for r, completions in zip(requests, self.run(together()), strict=True)
            for k, c in enumerate(completions)
        ]


@pytest.fixture(scope="module", params=BUILDERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(BUILDERS[request.param](tmp_path_factory.mktemp("thinkers") / request.param))
    yield engine
    engine.close()


def difference(policy: VlmPolicy, items: list[VlmExperience]) -> float:
    """The largest difference of engine and policy: all items in one batch behind shared prompts, and each alone."""
    engine = policy.rollout_logprobs(items)
    with torch.no_grad():
        out = policy.forward(policy.collate(items))
        alone = [policy.forward(policy.collate([item])).logprobs[0] for item in items]
    assert (engine[out.mask] < 0).all() and len({len(item.token_ids) for item in items}) > 2
    errors = [float((out.logprobs - engine).abs().max())]
    return max(errors + [float((row - engine[i, : len(row)]).abs().max()) for i, row in enumerate(alone)])


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_base_logprobs_equal_vllms(served: Engine, temperature: float) -> None:
    served.run(served.engine.load(None))
    policy = VlmPolicy.load(served.folder, temperature=temperature)
    worst = difference(policy, served.sampled(temperature))
    print(f"{served.folder.name}, base, temperature {temperature}: max error {worst:.1e}")
    assert worst <= BASE_TOLERANCE


def test_a_published_adapter_is_served(served: Engine) -> None:
    policy = VlmPolicy.load(served.folder, lora=LORA)
    perturb_adapter(policy.module, seed=4)
    served.run(served.engine.load(pack(3, "lora", policy.adapter_state(), policy.adapter_config)))
    items = served.sampled()
    worst = difference(policy, items)
    print(f"{served.folder.name}, LoRA: max error {worst:.1e}")
    assert worst <= LORA_TOLERANCE and served.engine.version == 3
    assert difference(VlmPolicy.load(served.folder), items) > 100 * LORA_TOLERANCE, "the adapter matters"


def test_published_weights_are_served_and_the_folders_come_back(served: Engine) -> None:
    before = served.run(served.engine.base_hash())
    policy = VlmPolicy.load(served.folder)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    served.run(served.engine.load(pack(4, "full", policy.module.state_dict(), {})))
    items = served.sampled()
    worst = difference(policy, items)
    print(f"{served.folder.name}, published weights: max error {worst:.1e}")
    assert worst <= BASE_TOLERANCE and served.run(served.engine.base_hash()) != before
    served.run(served.engine.load(None))
    assert served.run(served.engine.base_hash()) == before
    assert difference(VlmPolicy.load(served.folder), served.sampled()) <= BASE_TOLERANCE


def test_another_video_is_another_answer_and_videos_are_counted(served: Engine) -> None:
    served.run(served.engine.load(None))
    served.run(served.engine.backend.drop_caches())
    before = served.run(served.engine.counters())
    items = served.sampled()
    after = served.run(served.engine.counters())
    assert (after["videos"] - before["videos"], after["videos_asked"] - before["videos_asked"]) == (4, 8)
    policy, item = VlmPolicy.load(served.folder), items[0]
    other = VideoQuestion(item.asked.question, item.asked.frames[::-1].copy(), item.asked.fps)
    turned = VlmExperience("t", 0, other, item.token_ids, item.rollout_logprobs, 0.0)
    assert difference_of(policy, turned) > 1e-3, "the order of frames matters"


def difference_of(policy: VlmPolicy, item: VlmExperience) -> float:
    with torch.no_grad():
        (row,) = policy.forward(policy.collate([item])).logprobs
    return float((row - torch.from_numpy(np.array(item.rollout_logprobs))).abs().max())
