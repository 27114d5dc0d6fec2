"""What a make of thinker needs beyond its own processor: one table, and a refusal of what would need a row and has none.

Placeholders, grids and time stamps come from the processor. A row says where vLLM places a prompt's tokens when that is not in a
plain line, and what makes our processor and vLLM's show a video alike. Not responsible for loading (``actors.vlm.loading``) or
for what vLLM can serve (``actors.vlm.servable``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors.vlm.positions import one_axis, spaced_by_seconds, step_by_step
from cluster.errors import CheckpointError

Positions = Callable[[Mapping[str, Any], Any, torch.dtype], tuple[Tensor, int]]
"""From the processor's outputs for one prompt, the model's configuration and vLLM's dtype: positions (A, P), and the next one."""


def _nothing(processor: Any) -> None:
    """Most processors are right as they are loaded."""


def _size_of_images(processor: Any) -> None:
    """vLLM 0.32 gives InternVL's video processor the size of its image processor."""
    processor.video_processor.size = processor.image_processor.size


@dataclass(frozen=True)
class Make:
    """One make. ``options`` are given to the processor when it is loaded, here and in vLLM; ``prepare`` changes ours afterwards.

    ``text`` is what the language model's configuration must say, because vLLM asks for it and transformers does not.
    """

    positions: Positions = one_axis
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = _nothing
    text: Mapping[str, Any] = field(default_factory=dict)


_ANY = Make()
_QWEN_OPTIONS = {"cap_pixels_per_frame": False}
"""What transformers 5.22 is going to change by itself, and transformers 5.19 warns of until it is said: a video has its pixels
as the processor's ``size`` says, whatever the number of its frames."""

MAKES: dict[str, Make] = {
    "qwen2_5_vl": Make(spaced_by_seconds, _QWEN_OPTIONS),
    "qwen3_vl": Make(step_by_step, _QWEN_OPTIONS),
    "qwen3_vl_moe": Make(step_by_step, _QWEN_OPTIONS),
    # Without it vLLM 0.32 leaves the biases of queries, keys and values out, and says nothing.
    "glm4v": Make(step_by_step, text={"attention_bias": True}),
    "internvl": Make(prepare=_size_of_images),
}
"""By ``model_type``. A make that is not here needs nothing but its processor, and has positions on one axis."""


def make_of(config: Any) -> Make:
    """Return the row of a transformers configuration's make.

    Raises:
        CheckpointError: the make has no row, and its positions have several axes; or ``text`` of its row does not hold.
    """
    kind = config.model_type
    if kind in MAKES:
        make, text = MAKES[kind], config.get_text_config() if MAKES[kind].text else None
        for key, value in make.text.items():
            if getattr(text, key, None) != value:
                raise CheckpointError(
                    f"config.json has text_config.{key}={getattr(text, key, None)!r}, but {kind} has {value!r}: transformers takes "
                    "it for granted, and vLLM would leave out what it stands for; write it as the published config.json does"
                )
        return make
    from transformers import MODEL_MAPPING

    if type(config) in MODEL_MAPPING and hasattr(MODEL_MAPPING[type(config)], "get_rope_index"):
        known = ", ".join(name for name, make in MAKES.items() if make.positions is not one_axis)
        raise CheckpointError(
            f"config.json has model_type={kind!r}, a model whose rotary positions have several axes; vLLM's are known here for "
            f"{known}, and libraries differ in them: use one of these, or a thinker with positions on one axis"
        )
    return _ANY
