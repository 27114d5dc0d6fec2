"""The release at tiny size, in our own words: a clone's files with the names that are read, and weights under the names it uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.release.clone import AGENT, FRAMES, INFERENCE, PIPELINE

SYSTEM = "Look at the clip and say what comes next. Reason between [Think][/Think], then tell it between [Ans][/Ans]."
NEGATIVE = "a blurred clip, a frozen clip"
TINY: Mapping[str, Any] = {
    "system": SYSTEM,
    "negative": NEGATIVE,
    "pattern": r"\[Ans\](.*?)\[/Ans\]",
    "queries": 0,
    "tokens": 24,
    "unit": 16,
    "least": "4 * 16 * 16",
    "most": "16 * 16 * 16",
    "frames_seen": 6,
    "size": 32,
    "frames": 9,
    "fps": 11,
    "steps": 2,
    "rank": 4,
}
"""What the tiny clone says where the authors' has the real sizes."""

_FILES = {
    AGENT: """
class MLLMAgentConfig:
    def __init__(
        self,
        mllm_lora_config={{
            "r": {rank},
            "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        }},
        num_visionqueries: int = {queries},
        system_prompt: str = {system!r},
    ):
        pass

class MLLMAgent:
    def generate_with_query(self, instructions=None):
        if self.plain:
            out = self.mllm_backbone.generate(max_new_tokens={tokens}, do_sample=True, temperature=0.7, top_p=0.9)
        else:
            out = self.mllm_backbone.generate(max_new_tokens=8, do_sample=True, temperature=0.1, top_p=0.2)
        return out

    def generate_grpo_samples(self, batch=None):
        max_generate_length = {tokens}
        return max_generate_length
""",
    FRAMES: """
IMAGE_FACTOR = {unit}
VIDEO_MIN_PIXELS = {least}
VIDEO_MAX_PIXELS = {most}
FPS_MAX_FRAMES = {frames_seen}
""",
    PIPELINE: """
def extract_caption(text):
    pattern = {pattern!r}
    return pattern

class WanVideoPipeline:
    def __init__(self):
        self.scheduler = FlowMatchScheduler(shift=5, sigma_min=0.0, extra_one_step=True)

    def __call__(
        self, prompt: str, cfg_scale: float = 5.0, num_inference_steps: int = {steps}, sigma_shift: float = 5.0,
        tile_size: tuple = (30, 52), tile_stride: tuple = (15, 26),
    ):
        indices = torch.linspace(0, total_frames - 1, 6).long()
        return indices
""",
    INFERENCE: """
def process_video_row(pipe, row):
    text, video = pipe(prompt=row, negative_prompt={negative!r}, seed=0, tiled=True, height={size}, width={size}, num_frames={frames})
    save_video(video, "out.mp4", fps={fps}, quality=5)
""",
}


def build_clone(folder: Path, **changes: Any) -> Path:
    """Write the tiny clone; ``changes`` are of :data:`TINY`."""
    for file, text in _FILES.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**{**TINY, **changes}), encoding="utf-8")
    return folder


PREFIX = "pipe.mllm.mllm_backbone."
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tuned_thinker(base: Path, rank: int = 4, seed: int = 0) -> Any:
    """Return the thinker in ``base`` as PEFT adapts it by the release's suffixes, tower included, with adapters that change it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules=list(TARGETS)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tuned.eval()


def old_name(name: str) -> str:
    """Return a weight's name as transformers had it when the release was made."""
    return name.replace("model.language_model.", "model.").replace("model.model.visual.", "model.visual.")


def thinker_tensors(tuned: Any, *, tower: bool = True, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Return the adapters of ``tuned`` under the release's names."""
    return {
        prefix + old_name(name): tensor.clone()
        for name, tensor in tuned.state_dict().items()
        if "lora_" in name and (tower or ".visual." not in name)
    }


_WAN = {
    r"^condition_embedder\.time_embedder\.linear_1\.": "time_embedding.0.",
    r"^condition_embedder\.time_embedder\.linear_2\.": "time_embedding.2.",
    r"^condition_embedder\.text_embedder\.linear_1\.": "text_embedding.0.",
    r"^condition_embedder\.text_embedder\.linear_2\.": "text_embedding.2.",
    r"^condition_embedder\.time_proj\.": "time_projection.1.",
    r"^scale_shift_table$": "head.modulation",
    r"^proj_out\.": "head.head.",
    r"\.scale_shift_table$": ".modulation",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0\.": ".o.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.",
    r"\.ffn\.net\.2\.": ".ffn.2.",
    r"\.norm2\.": ".norm3.",
}


def wan_name(name: str) -> str:
    """Return what Wan's authors call the weight that diffusers calls ``name``."""
    for pattern, other in _WAN.items():
        name = re.sub(pattern, other, name)
    return name


def artist_tensors(seed: int = 7) -> tuple[Any, dict[str, Tensor]]:
    """Return a tiny transformer, and its weights under the names of Wan's authors."""
    from pipeline.pretrain.architectures import build_tiny_transformer

    transformer = build_tiny_transformer(seed).eval()
    return transformer, {wan_name(name): tensor.clone() for name, tensor in transformer.state_dict().items()}


def save(tensors: Mapping[str, Tensor], file: Path) -> Path:
    """Write ``tensors`` as a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(file))
    return file
