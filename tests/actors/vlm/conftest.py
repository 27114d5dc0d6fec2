from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import start_ray

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start_vlm(_ray_session: None) -> Callable[[Path], Any]:
    """Starts the real Ray actor with a real vLLM engine, which takes some 15 seconds; whoever starts one ends it."""
    import ray

    def start(folder: Path) -> Any:
        # A class made here travels by value: Ray's workers do not import this file.
        from actors.vlm.settings import VlmPoolSection
        from actors.vlm.worker import VlmWorker

        class Worker(VlmWorker):
            """The pool's worker, with two windows into its vLLM."""

            async def text_at_end(self, on: bool, request: Any) -> bool:
                """Make texts at a completion's end from now on, or token by token; return whether vLLM makes that of ``request``."""
                self._engine.spec = replace(self._engine.spec, settings=VlmPoolSection(text_at_end=on))
                return bool(self._engine._sampling(request).detokenize)

            async def complete_text(self, prompt: str, request: Any) -> list[tuple[list[int], list[float]]]:
                """Completions of a prompt without a video, with the sampling parameters of any other request."""
                adapter = self._engine._adapter
                lora = adapter and adapter.request
                out = await self._engine.backend.generate({"prompt": prompt}, self._engine._sampling(request), lora)
                return [
                    (list(o.token_ids), [step[token].logprob for step, token in zip(o.logprobs, o.token_ids)])
                    for o in out.outputs
                ]

            async def positions(self) -> list[tuple[list[int], Any]]:
                """From the first call on, (prompt tokens, rotary positions) of every prompt that vLLM's model reads."""
                import vllm.model_executor.models.qwen2_5_vl as module

                kind, seen = module.Qwen2_5_VLForConditionalGeneration, getattr(self, "_seen", None)
                if seen is None:
                    self._seen, original = [], kind.get_mrope_input_positions

                    def spy(model: Any, tokens: list[int], features: Any) -> Any:
                        result = original(model, tokens, features)
                        self._seen.append((list(tokens), result[0].numpy()))
                        return result

                    kind.get_mrope_input_positions = spy
                return list(self._seen)

        options = {"lora_rank": 8, "settings": VlmPoolSection(kv_cache_mib=64), "broadcast": True}
        actor = ray.remote(Worker).options(num_cpus=1, max_concurrency=64).remote("vlm-0", str(folder), **options)
        info = ray.get(actor.setup.remote(), timeout=500)
        assert info.name == "vlm-0" and info.model_hash
        return actor

    return start


def stop_vlm(actor: Any) -> None:
    """End a worker of ``start_vlm`` and its engine."""
    import ray

    ray.get(actor.shutdown.remote(), timeout=60)
    ray.kill(actor)


@pytest.fixture(scope="module")  # pytest ends a package's fixtures with the session here, when this Ray is gone
def qwen3_worker(tiny_vlm_dir: Path, start_vlm: Callable[[Path], Any]) -> Iterator[Any]:
    """One engine on the tiny Qwen3-VL; a test loads the weights that it needs."""
    start_ray()
    actor = start_vlm(tiny_vlm_dir)
    yield actor
    stop_vlm(actor)


@pytest.fixture(scope="module")
def qwen25_worker(tiny_qwen25_dir: Path, start_vlm: Callable[[Path], Any]) -> Iterator[Any]:
    """One engine on the tiny Qwen2.5-VL."""
    start_ray()
    actor = start_vlm(tiny_qwen25_dir)
    yield actor
    stop_vlm(actor)
