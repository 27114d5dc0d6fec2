"""What vLLM cannot serve is refused before an engine is started, with file and reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from actors.vlm.servable import require_same_tokens, require_servable
from cluster.errors import CheckpointError

pytestmark = pytest.mark.slow


def folder_of(folder: Path, kind: str, architecture: str) -> str:
    """A folder with a configuration alone."""
    config = AutoConfig.for_model(kind)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "architecture", "lora", "said"),
    [
        ("smolvlm", "SmolVLMForConditionalGeneration", False, "shows no video"),
        ("llava_onevision", "NoSuchArchitecture", False, r"which vLLM \S+ does not know"),
        (
            "llava_onevision",
            "LlavaOnevisionForConditionalGeneration",
            True,
            r"LoRA .* cannot serve.*stage1\.lora\.rank=0",
        ),
    ],
)
def test_what_vllm_cannot_serve_is_refused(kind: str, architecture: str, lora: bool, said: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path, kind, architecture)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: architectures in config\.json are {architecture}.*{said}"):
        require_servable(path, lora)


@pytest.mark.parametrize(
    ("kind", "architecture", "lora"),
    [
        ("llava_onevision", "LlavaOnevisionForConditionalGeneration", False),
        ("internvl", "InternVLForConditionalGeneration", True),
        ("glm4v", "Glm4vForConditionalGeneration", True),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", True),
    ],
)
def test_what_vllm_serves_is_not_refused(kind: str, architecture: str, lora: bool, tmp_path: Path) -> None:
    require_servable(folder_of(tmp_path, kind, architecture), lora)


def test_prompts_in_other_tokens_are_refused() -> None:
    """Image tokens may stand for video tokens; nothing else may differ."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {"<image>": 7, "<video>": 8, "a": 1})
    processor = SimpleNamespace(tokenizer=tokenizer, image_token="<image>", video_token="<video>")
    ours = torch.tensor([1, 7, 7, 2, 3])
    require_same_tokens("folder", processor, ours, [1, 8, 8, 2, 3])
    for theirs, said in (
        ([1, 8, 2, 3], "in 4 tokens and the processor in 5; they part at token 2"),
        ([1, 8, 8, 2, 4], "in 5 tokens and the processor in 5; they part at token 4"),
    ):
        with pytest.raises(CheckpointError, match=f"folder: vLLM reads a prompt {said}"):
            require_same_tokens("folder", processor, ours, theirs)
