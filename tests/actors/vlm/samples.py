"""Small video questions and completions for the tests of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.records import VideoQuestion, VlmExperience
from actors.vlm.positions import mrope_positions
from actors.vlm.rows import VlmBatch

QUESTIONS = ("What happens next?", "What is the next step of the red circle?", "What if the blue square rises?")
SIZES = ((9, 32, 32, 8.0), (2, 48, 32, 8.0), (17, 32, 64, 2.5), (5, 32, 32, 24.0))  # frames, height, width, fps


def frames(seed: int, count: int = 9, size: int = 32) -> np.ndarray:
    """Random frames, uint8 (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def experience(seed: int, length: int, eos: int, count: int = 9) -> VlmExperience:
    """A completion of ``length`` ordinary tokens, the last one EOS."""
    rng = np.random.default_rng(100 + seed)
    tokens = np.append(rng.integers(0, 500, length - 1), eos).astype(np.int32)
    question = QUESTIONS[seed % len(QUESTIONS)]
    logprobs = rng.normal(-3, 1, length).astype(np.float32)
    return VlmExperience(f"s{seed}", seed, VideoQuestion(question, frames(seed, count), 8.0), tokens, logprobs, 1.0)


def perturb_adapter(module: Any, seed: int, scale: float = 0.05) -> None:
    """Give the adapter weights that change the model, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def text_batch(prompts: list[Tensor], completions: list[np.ndarray]) -> VlmBatch:
    """Prompts of text alone, joined with their completions and padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    answers = [torch.from_numpy(c.astype(np.int64)) for c in completions]
    ids = [torch.cat(pair) for pair in zip(prompts, answers)]
    none = torch.zeros(0, 3, dtype=torch.long)
    positions = [mrope_positions(torch.zeros(len(x), dtype=torch.long), none, 2, None)[0] for x in ids]
    tokens = pad(answers, batch_first=True)
    steps, starts = torch.arange(tokens.shape[1]), torch.tensor([len(p) for p in prompts])
    inputs = {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "position_ids": pad([p.T for p in positions], batch_first=True).permute(2, 0, 1),
        "use_cache": False,
    }
    mask = steps[None] < torch.tensor([len(a) for a in answers])[:, None]
    predictors = (starts[:, None] - 1 + steps[None]).clamp(max=inputs["input_ids"].shape[1] - 1)
    return VlmBatch(inputs, tokens, mask, torch.arange(len(prompts)), predictors)
