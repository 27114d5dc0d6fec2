"""One tiny random Wan pipeline for all tests of the artist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.learner.trainable import LoraSpec
from actors.records import RenderRequest, SdeSpec
from actors.vdm.policy import VdmPolicy

SDE = SdeSpec("flow", 0.7, 0, 2)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline folder with random weights and latent statistics that are not trivial."""
    from pipeline.pretrain.architectures import (
        build_tiny_text_encoder,
        build_tiny_transformer,
        build_tiny_vae,
        vdm_pipeline,
    )
    from pipeline.pretrain.tokenizers import word_tokenizer

    vae = build_tiny_vae(1)
    vae.register_to_config(
        latents_mean=[0.1 * (i % 5 - 2) for i in range(16)], latents_std=[0.8 + 0.05 * i for i in range(16)]
    )
    vocabulary = len(word_tokenizer(max_length=16, clip=False))
    folder = tmp_path_factory.mktemp("tiny_vdm")
    pipe = vdm_pipeline(vae, build_tiny_transformer(1), build_tiny_text_encoder(vocabulary, 1))
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def policy(tiny: Path) -> VdmPolicy:
    """The base pipeline; tests must not change its weights."""
    return VdmPolicy.load(tiny)


@pytest.fixture
def lora_policy(tiny: Path) -> VdmPolicy:
    """The pipeline with an adapter whose B is not zero."""
    return with_random_adapter(VdmPolicy.load(tiny, lora=LoraSpec(rank=4, alpha=8.0, seed=3)))


def with_random_adapter(policy: VdmPolicy, scale: float = 0.05) -> VdmPolicy:
    """Give lora_B seeded random values."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


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
