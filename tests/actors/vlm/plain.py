"""The reference of the VLM's parity ladder: processor, model, log_softmax, of transformers and PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from actors.vlm.settings import PROMPT


class PlainModel:
    """A model folder, and an adapter folder where given, as anyone would load them."""

    def __init__(self, folder: str | Path, adapter: Path | None = None) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.core = self.model.model  # before PEFT wraps it
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def prompt(self, question: str, frames: np.ndarray | None, fps: float) -> Any:
        """What the processor makes of a question about a video, or of the question alone (``frames`` None)."""
        video = [] if frames is None else [{"type": "video"}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": PROMPT.system_text}]},
            {"role": "user", "content": [*video, {"type": "text", "text": question}]},
        ]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if frames is None:
            return self.processor(text=[text], return_tensors="pt")
        shown = VideoMetadata(
            total_num_frames=len(frames), fps=fps, duration=len(frames) / fps, frames_indices=list(range(len(frames)))
        )
        return self.processor(
            text=[text], videos=[frames], video_metadata=[shown], do_sample_frames=False, return_tensors="pt"
        )

    @torch.no_grad()
    def logprobs(
        self,
        question: str,
        frames: np.ndarray | None,
        fps: float,
        tokens: np.ndarray,
        temperature: float = 1.0,
        vllm_positions: bool = False,
    ) -> Tensor:
        """Log-probabilities (L,) of the completion ``tokens``, with special tokens other than EOS ruled out.

        ``vllm_positions``: the text after the video starts one above the video's largest position (arXiv 2409.12191,
        M-RoPE), which transformers 5.19 does for Qwen3-VL but not for Qwen2.5-VL.
        """
        inputs = self.prompt(question, frames, fps)
        completion = torch.tensor(tokens.astype(np.int64))[None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], completion], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        types = inputs.get("mm_token_type_ids")
        if types is not None:
            inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(completion)], 1)
        if vllm_positions and frames is not None:
            inputs["position_ids"] = self.positions_after_the_video(inputs)
        logits = self.model(**inputs).logits[0, -completion.shape[1] - 1 : -1].float()
        tokenizer = self.processor.tokenizer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        logits[:, sorted(special - {tokenizer.eos_token_id})] = -torch.inf
        return (logits / temperature).log_softmax(-1).gather(1, completion[0, :, None])[:, 0]

    def positions_after_the_video(self, inputs: Any) -> Tensor:
        """transformers' own positions (3, 1, S), the text after the last video token moved behind the video."""
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
        positions, _ = self.core.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
        last = int((inputs["input_ids"][0] == self.core.config.video_token_id).nonzero()[-1]) + 1
        rest = positions.shape[-1] - last
        positions[..., last:] = positions[..., :last].max() + 1 + torch.arange(rest)
        return positions
