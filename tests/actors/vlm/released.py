"""What the release's thinker code and ours were both given: a tokenizer, processor settings, a question about a video, an answer.

``tests/golden/release_vlm.safetensors`` has what its code made of it, the header says how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from actors.vlm.settings import PromptSection

GOLDEN = Path(__file__).parents[2] / "golden"
SYSTEM = "You see a video. Think first, then say what comes next in one sentence."
QUESTION = "What comes next if the red circle rises?"
THOUGHT, CAPTION = "the red circle rises, so the blue square sinks", "the blue square sinks"
PROMPT = PromptSection(system=SYSTEM, think_tag="[Think]", answer_tag="[Ans]", caption="first", spaced=False)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SIZES = {"grown": (60, 100), "shrunk": (640, 1000), "rendered": (352, 640), "kept": (364, 644)}
PIXELS, MULTIPLE = (128 * 28 * 28, 768 * 28 * 28), 28
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2.5-VL's own
SHAPE: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- for part in message.content -%}{%- if part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def backend() -> Tokenizer:
    """Return byte-level BPE learnt from the texts above, with Qwen's special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=SPECIAL
    )
    # Roles are one token each, as Qwen's are: the release finds the answer by that of "assistant".
    texts = [*["system", "user", "assistant"] * 9, SYSTEM, QUESTION, THOUGHT, CAPTION, "[Think] [/Think] [Ans] [/Ans]"]
    made.train_from_iterator(texts, trainer)
    return made


def clip(name: str, frames: int = 6) -> np.ndarray:
    """Return a clip of coloured noise in coarse blocks, uint8 (frames, H, W, 3) of ``SIZES``."""
    height, width = SIZES[name]
    blocks = np.random.default_rng(height).integers(0, 256, (frames, height // 4, width // 4, 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


def thinned(pixels: Tensor) -> Tensor:
    """Return some 500 of the values of a video's patches, spread over all of them: what was kept."""
    return pixels.flatten()[:: pixels.numel() // 499].contiguous()


def losses_case() -> dict[str, Any]:
    """Return a batch of four answers of up to 5 tokens behind prompts of 3: logits (4, 8, 11), ids, mask, advantages, reference."""
    rng = np.random.default_rng(15)
    lengths = torch.tensor([5, 2, 4, 1])
    return {
        "logits": torch.from_numpy(rng.normal(size=(4, 8, 11)).astype(np.float32)),
        "ids": torch.from_numpy(rng.integers(0, 11, (4, 8))),
        "mask": torch.arange(5)[None] < lengths[:, None],
        "advantages": torch.tensor([1.5, -0.5, 0.25, -1.0]),
        "reference": torch.from_numpy(rng.normal(-2.4, 0.5, (4, 5)).astype(np.float32)),
    }


def answer_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities (B, 5) of the last five tokens."""
    return logits[:, 2:7].log_softmax(-1).gather(-1, ids[:, 3:, None])[..., 0]
