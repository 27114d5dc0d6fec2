"""The tiny artist that the release's code and ours were both given, and what they were asked.

Every weight is drawn from its own name, so that nothing but names, shapes and results had to be kept. ``tests/golden`` has those:
``release_names.json`` the release's names, ``release_vdm.safetensors`` what its code made of them; the headers say how.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

GOLDEN = Path(__file__).parents[2] / "golden"
SEED = 15
FRAMES, HEIGHT, WIDTH = 9, 16, 32  # of the clip that is drawn
INPUT_FRAMES = 33
CAPTION, NEGATIVE = "the red circle rises and the blue square sinks", "still grey square"
NOISE_SEED, STEPS, GUIDANCE, SHIFT = 7, 10, 5.0, 5.0
LOSS_SEEDS = 5
PRINTED, TYPED = "the blue square’s “still” grey", 'the blue square\'s "still" grey'
WORDS = ["the", "red", "circle", "rises", "and", "blue", "square", "sinks", "still", "grey", "s", "'", '"']
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
TEXT: dict[str, Any] = {
    "vocab_size": 16,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weight of this name: normal, over the root of its fan-in; vectors .2 wide, around 1 where they scale."""
    values = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape)
    if math.prod(shape) == max(shape):
        values = 0.2 * values + (0.0 if name.endswith("bias") else 1.0)
    else:
        values = values / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def released_state(part: str) -> dict[str, Tensor]:
    """Return the weights of ``transformer`` or ``vae`` under the release's names."""
    names = json.loads((GOLDEN / "release_names.json").read_text("utf-8"))[part]
    return {name: drawn(name, tuple(shape)) for name, shape in names.items()}


def pixels(what: str, frames: int) -> np.ndarray:
    """Return a clip of noise, uint8 (frames, HEIGHT, WIDTH, 3)."""
    rng = np.random.default_rng([SEED, zlib.crc32(what.encode())])
    return rng.integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return whole words, ended as UMT5's are."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def transformer() -> Any:
    """Return diffusers' transformer with the released weights, renamed by diffusers' own converter."""
    model = WanTransformer3DModel(**TRANSFORMER)
    model.load_state_dict(convert_wan_transformer_to_diffusers(released_state("transformer")), strict=True)
    return model.eval()


def vae() -> Any:
    """Return diffusers' VAE with the released weights, renamed by diffusers' own converter; Wan's statistics of latents."""
    model = AutoencoderKLWan(base_dim=4)
    model.load_state_dict(convert_wan_vae_to_diffusers(released_state("vae")), strict=True)
    return model.eval()


def text_encoder() -> Any:
    """Return transformers' encoder, its weights drawn from transformers' names."""
    model = UMT5EncoderModel(UMT5Config(**TEXT)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(drawn(name, tuple(tensor.shape)))
    return model


def save(folder: Path) -> Path:
    """Write the whole as a diffusers folder."""
    WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).save_pretrained(folder, safe_serialization=True)
    return folder
