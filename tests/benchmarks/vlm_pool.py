"""Rows 1 and 2: the VLM pool beside bare vLLM and beside transformers, on video prompts with groups of eight completions."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import ray
import torch

from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from actors.records import CompletionRequest
from actors.vlm.engine_args import EngineSpec, engine_args, prepare_environment
from actors.vlm.inputs import video_prompt
from actors.vlm.loading import load_model
from actors.vlm.prompt import BAN_BIAS, banned_token_ids
from actors.vlm.worker import VlmWorker
from pipeline.data.toy.world import make_sample
from pipeline.fleet.models import resolve_model
from tests.benchmarks.bench import Check, Result, Size, interleave_async, medians, ratios, start_ray

GROUP = 8
MAX_TOKENS = 40


def requests(count: int, turn: int) -> list[CompletionRequest]:
    """Return ``count`` requests about other videos every ``turn``, so that nothing is cached."""
    found = []
    for i in range(count):
        s = make_sample(turn * count + i, "train")
        found.append(CompletionRequest(s.id, s.asked, GROUP, seed=1000 * turn + i, max_tokens=MAX_TOKENS))
    return found


async def against(size: Size, *theirs: Any) -> list[tuple[float, ...]]:
    """Return tokens/s of the pool, and of each of ``theirs(requests) -> tokens``, round by round."""
    count, repeats = (32, 7) if size == "full" else (2, 1)
    path = str(resolve_model("tiny", "vlm"))
    actor = ray.remote(VlmWorker)
    spec = PoolSection(workers=1, max_batch=1, max_inflight=64, start_timeout_s=300)
    turn = 0
    async with WorkerPool(
        "vlm", lambda name: actor.options(num_cpus=1, max_concurrency=256).remote(name, path), spec
    ) as pool:

        async def ours() -> float:
            nonlocal turn
            turn += 1
            batch = requests(count, turn)
            began = time.perf_counter()
            answers = await asyncio.gather(*(pool.submit(r) for r in batch))
            return sum(len(c.token_ids) for group in answers for c in group) / (time.perf_counter() - began)

        def side(other: Any, k: int) -> Any:
            async def run() -> float:
                batch = requests(count, turn + 1000 * (k + 1))
                began = time.perf_counter()
                tokens = await asyncio.to_thread(other, batch)
                return tokens / (time.perf_counter() - began)

            return run

        return await interleave_async([ours, *(side(other, k) for k, other in enumerate(theirs))], repeats)


def measure(size: Size) -> Result:
    """Row 1."""
    start_ray()
    spec = EngineSpec(str(resolve_model("tiny", "vlm")))
    prepare_environment(spec)
    torch.set_num_threads(1)
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    args = {name: value for name, value in engine_args(spec).items() if name not in ("worker_extension_cls",)}
    llm = LLM(**args)
    processor = AutoProcessor.from_pretrained(spec.model_path)
    vocabulary = int(llm.llm_engine.model_config.hf_config.text_config.vocab_size)
    bias = dict.fromkeys(banned_token_ids(processor, vocabulary), BAN_BIAS)

    def bare(batch: list[CompletionRequest]) -> int:
        prompts, params = [], []
        for r in batch:
            asked = video_prompt(processor, r.asked)
            video = (asked.frames, {**asked.metadata, "do_sample_frames": False})
            prompts.append({"prompt": asked.text, "multi_modal_data": {"video": video}})
            params.append(
                SamplingParams(
                    n=r.n,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    max_tokens=r.max_tokens,
                    logprobs=0,
                    seed=r.seed,
                    logit_bias=bias,
                )
            )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(o.token_ids) for output in outputs for o in output.outputs)

    rounds = asyncio.run(against(size, bare))
    notes = (
        "One worker of the pool, a Ray actor, and `vllm.LLM` in this process have the same engine arguments and get requests of the",
        "same kind: 32 questions about videos that were never seen, eight seeded completions of at most 40 tokens with their",
        "log-probabilities. Only generated tokens are counted.",
    )
    check = Check("tokens/s, pool ÷ bare vLLM", ratios(rounds), "≥", 0.95)
    return Result((check,), medians(rounds, "tokens/s, pool", "tokens/s, bare vLLM"), notes)


def measure_transformers(size: Size) -> Result:
    """Row 2."""
    start_ray()
    torch.set_num_threads(1)
    model, processor = load_model(resolve_model("tiny", "vlm"), "float32")
    model.eval()
    any_model: Any = model
    banned = banned_token_ids(processor, int(any_model.config.text_config.vocab_size))
    eos = int(processor.tokenizer.eos_token_id)

    @torch.inference_mode()
    def generate(batch: list[CompletionRequest]) -> int:
        asked = [video_prompt(processor, r.asked) for r in batch]
        inputs = processor(
            text=[p.text for p in asked],
            videos=[torch.from_numpy(p.frames).permute(0, 3, 1, 2) for p in asked],
            video_metadata=[p.metadata for p in asked],
            do_sample_frames=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        tokens = any_model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=GROUP,
            max_new_tokens=MAX_TOKENS,
            bad_words_ids=[[token] for token in banned if token != eos],
            eos_token_id=eos,
            pad_token_id=int(processor.tokenizer.pad_token_id),
        )[:, inputs["input_ids"].shape[1] :]
        ended = (tokens == eos).cumsum(1)
        return int(
            ((ended == 0) | ((ended == 1) & (tokens == eos))).sum()
        )  # the first end token counts, padding does not

    def by_prompt(batch: list[CompletionRequest]) -> int:
        return sum(generate([request]) for request in batch)

    rounds = asyncio.run(against(size, by_prompt, generate))
    notes = (
        "transformers generates as TRL's `GRPOTrainer` does without vLLM, with its KV cache, in batches of eight sequences, which is",
        "TRL's default (`per_device_train_batch_size`): a prompt's group at a time. Tokens after a sequence's end are not counted.",
        "The same in one batch of all 32 prompts, 256 sequences padded on the left, is below: with a model as small as this one a",
        "step's cost hardly depends on the batch, so bare vLLM itself is about as fast as that (row 1). A real model leaves",
        "no memory for such a batch.",
    )
    check = Check("tokens/s, pool ÷ transformers generate, TRL's default batch", ratios(rounds), "≥", 5.0)
    names = ("tokens/s, pool", "tokens/s, transformers, 8 sequences at once", "tokens/s, transformers, 256 at once")
    figures = medians(rounds, *names) | {"pool ÷ transformers, 256 at once": statistics.median(ratios(rounds, 0, 2))}
    return Result((check,), figures, notes)
