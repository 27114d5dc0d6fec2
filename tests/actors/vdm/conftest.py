"""One tiny random Wan pipeline for all tests of the artist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from actors.policy.settings import LoraSection
from actors.records import RenderRequest
from actors.vdm.policy import VdmPolicy

LAYERS = 2


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline folder with random weights, Wan's own compression (4x8x8) and latent statistics that matter."""
    from pipeline.pretrain.tokenizers import word_tokenizer

    torch.manual_seed(1)
    tokenizer = word_tokenizer(max_length=16, clip=False)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.1 * (i % 5 - 2) for i in range(16)],
        latents_std=[0.8 + 0.05 * i for i in range(16)],
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    folder = tmp_path_factory.mktemp("tiny_vdm")
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def policy(tiny: Path) -> VdmPolicy:
    """The base pipeline; tests must not change its weights."""
    return VdmPolicy.load(tiny)


@pytest.fixture(scope="session")
def load_adapted(tiny: Path) -> Callable[[], VdmPolicy]:
    """Loads the pipeline with an adapter whose B is not zero: the same one each time."""

    def load() -> VdmPolicy:
        policy = VdmPolicy.load(tiny, lora=LoraSection(rank=4, alpha=8.0))
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, parameter in policy.module.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return policy

    return load


@pytest.fixture
def lora_policy(load_adapted: Callable[[], VdmPolicy]) -> VdmPolicy:
    """A fresh adapted pipeline."""
    return load_adapted()


@pytest.fixture(scope="session")
def make_request() -> Callable[..., RenderRequest]:
    """Requests that differ in what is given."""

    def make(index: int = 0, references: int = 2, **changes) -> RenderRequest:
        frames = np.random.default_rng(5).integers(0, 256, (references, 32, 32, 3), dtype=np.uint8)
        fields = {
            "sample_id": "s",
            "index": index,
            "caption": "the red circle rises",
            "reference_frames": frames,
            "num_frames": 9,
            "steps": 4,
            "guidance": 1.0,
            "noise_seed": 7,
            "sde_seed": index,
        }
        return RenderRequest(**{**fields, **changes})

    return make
