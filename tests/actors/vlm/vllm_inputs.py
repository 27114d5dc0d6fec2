"""What vLLM itself makes of a request for the thinker: its processor, and its model's own positions. No engine, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor

from actors.records import VideoQuestion
from actors.vlm.engine import engine_prompt


class VllmInputs:
    """vLLM's input pipeline for one model folder in one dtype."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
        from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
        from vllm.multimodal import MULTIMODAL_REGISTRY

        args = EngineArgs(model=str(folder), dtype=dtype, limit_mm_per_prompt={"video": 1, "image": 0})
        config = args.create_model_config()
        self.processor = MULTIMODAL_REGISTRY.create_processor(config)
        self.ours = AutoProcessor.from_pretrained(folder)
        classes: dict[str, Any] = {
            "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
            "qwen3_vl": Qwen3VLForConditionalGeneration,
        }
        kind = classes[config.hf_config.model_type]
        self.model = object.__new__(kind)
        self.model.__dict__["config"] = config.hf_config  # all that its positions read

    def __call__(self, asked: VideoQuestion) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Return token ids (P,), positions (3, P) and normalised patches of the request that our engine makes of ``asked``."""
        from vllm.multimodal.inputs import MultiModalFeatureSpec
        from vllm.multimodal.processing.context import TimingContext
        from vllm.multimodal.processing.inputs import ProcessorInputs

        prompt = engine_prompt(self.ours, asked)
        items = self.processor.info.parse_mm_data(prompt["multi_modal_data"])
        ids = self.ours.tokenizer(prompt["prompt"], add_special_tokens=False)["input_ids"]
        inputs = ProcessorInputs(ids, items, hf_processor_mm_kwargs=prompt.get("mm_processor_kwargs", {}))
        made = self.processor.apply(inputs, TimingContext(enabled=False))
        (data,), (place,) = made["mm_kwargs"]["video"], made["mm_placeholders"]["video"]
        feature = MultiModalFeatureSpec(data=data, modality="video", identifier="", mm_position=place)
        tokens = list(made["prompt_token_ids"])
        positions, _ = self.model.get_mrope_input_positions(tokens, [feature])
        pixels = data["pixel_values_videos"].data.float().numpy()
        # vLLM normalises in the model; mean and standard deviation of the tiny models are one half.
        return tokens, positions.numpy(), pixels / 127.5 - 1.0
