"""Trains the tiny thinker from random weights on the toy world's ``sft`` answers, and measures it.

Responsible for the loop that takes a Qwen3-VL from nothing to answers, and for its quality line. Prompt and loss are
``actors.vlm``'s own, so the tuned model meets the very text it will be sampled with.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from actors.records import derive_seed
from actors.vlm.inputs import video_prompt
from actors.vlm.policy import VlmPolicy
from pipeline.data.toy.language import drawable, language_in, parse_caption
from pipeline.data.toy.world import ToySample, make_sample
from rewards.format import parse_answer
from rewards.text import rouge_l

from .loop import Average, Tick, cosine, no_tick
from .muon import MuonAdam


def train_thinker(
    policy: VlmPolicy,
    samples: list[ToySample],
    *,
    steps: int,
    seed: int,
    batch: int = 32,
    tick: Tick = no_tick,
) -> None:
    """Trains all weights in place for ``steps`` steps; the weights end as their moving average."""
    rng = np.random.default_rng(derive_seed("thinker", seed))
    module = policy.module
    module.train()
    optimizer = MuonAdam(module, lr=0.02, adam_lr=3e-3)
    average = Average(module)
    for step in range(steps):
        chosen = [samples[i] for i in rng.integers(len(samples), size=batch)]
        loss = policy.sft_loss([(s.asked, s.answer_text) for s in chosen]).mean
        loss.backward()
        optimizer.step(cosine(step, steps))
        average.update()
        tick(step, steps, float(loss.detach()))
    average.store()
    module.eval()


@torch.no_grad()
def answer(policy: VlmPolicy, samples: list[ToySample], videos: list[np.ndarray], *, sample: bool) -> list[str]:
    """Answers of the model to the samples' questions about ``videos``, by transformers' generate, greedy or at temperature 1."""
    processor = policy.processor
    tokenizer = processor.tokenizer
    shown = [video_prompt(processor, replace(s.asked, frames=v)) for s, v in zip(samples, videos, strict=True)]
    inputs = processor(
        text=[p.text for p in shown],
        videos=[p.frames for p in shown],
        video_metadata=[VideoMetadata(**p.metadata) for p in shown],
        do_sample_frames=False,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    generated = policy.module.generate(
        **inputs,
        max_new_tokens=64,
        do_sample=sample,
        temperature=1.0 if sample else None,
        top_k=0 if sample else None,
        top_p=1.0 if sample else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [str(t) for t in tokenizer.batch_decode(generated[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)]


def thinker_quality(policy: VlmPolicy, *, count: int = 128, seed: int = 0, split: str = "val") -> dict[str, float]:
    """On held-out samples: format, event and wording of sampled answers, greedy ones, and ones about somebody else's video.

    ``event_zh`` is of greedy answers to Chinese questions, and counts Chinese answers alone.
    """
    samples = [make_sample(i, split, seed) for i in range(count)]
    videos = [s.input_frames for s in samples]
    strangers = videos[2:] + videos[:2]  # 2, because neighbours can share one input clip
    torch.manual_seed(derive_seed("thinker-quality", seed))
    result = {}
    for name, shown, sampled in (("sampled", videos, True), ("greedy", videos, False), ("shuffled", strangers, False)):
        answers = [parse_answer(text) for text in answer(policy, samples, shown, sample=sampled)]
        captions = ["" if a is None else a.caption for a in answers]
        result[f"event_{name}"] = float(np.mean([parse_caption(c) == s.event for c, s in zip(captions, samples)]))
        if name == "shuffled":
            continue
        result[f"format_{name}"] = float(np.mean([a is not None for a in answers]))
        result[f"drawable_{name}"] = float(np.mean([drawable(c) for c in captions]))
        result[f"rouge_l_{name}"] = float(np.mean([rouge_l(c, s.caption) for c, s in zip(captions, samples)]))
    chinese = [make_sample(i, split, seed, "zh") for i in range(count)]
    replies = [parse_answer(text) for text in answer(policy, chinese, videos, sample=False)]
    result["event_zh"] = float(
        np.mean(
            [
                a is not None and language_in(a.caption) == "zh" and parse_caption(a.caption) == s.event
                for a, s in zip(replies, chinese)
            ]
        )
    )
    return result
