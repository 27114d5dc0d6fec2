"""Small video questions and completions for the tests of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from actors.records import VlmExperience

QUESTIONS = ("What happens next?", "What is the next step of the red circle?", "What if the blue square rises?")


def frames(seed: int, count: int = 9, size: int = 32) -> np.ndarray:
    """Random frames, uint8 (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def experience(seed: int, length: int, eos: int, count: int = 9) -> VlmExperience:
    """A completion of ``length`` ordinary tokens, the last one EOS."""
    rng = np.random.default_rng(100 + seed)
    tokens = np.append(rng.integers(0, 500, length - 1), eos).astype(np.int32)
    question = QUESTIONS[seed % len(QUESTIONS)]
    logprobs = rng.normal(-3, 1, length).astype(np.float32)
    return VlmExperience(f"s{seed}", seed, question, frames(seed, count), 8.0, tokens, logprobs, 1.0)


def perturb_adapter(module: Any, seed: int, scale: float = 0.05) -> None:
    """Give the adapter weights that change the model, as training would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
