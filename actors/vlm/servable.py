"""What vLLM can serve, asked before an engine is started and once when it runs.

Responsible for refusing, with the reason, an architecture that vLLM does not know, that it shows no video, or whose adapters it
cannot serve; and a prompt that vLLM reads in other tokens than the learner. Not responsible for what can be trained
(``actors.vlm.loading``). vLLM is imported when it is asked, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from actors.records import VideoQuestion
from actors.vlm.loading import load_config
from actors.vlm.prompt import placeholder_ids
from cluster.errors import CheckpointError

PROBE = VideoQuestion("?", np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), 8.0)
"""What an engine is asked once, for the tokens that it reads."""


def require_servable(path: str, lora: bool) -> None:
    """Raise CheckpointError unless vLLM knows the model in ``path``, shows it videos, and where ``lora`` asks for it serves adapters.

    vLLM's own fall-back, which runs any model of transformers, is not taken: nothing here was compared with it.
    """
    import vllm
    from vllm.model_executor.models import ModelRegistry, supports_lora

    names = load_config(path).architectures or []
    release = f"vLLM {vllm.__version__}"
    where = f"{path}: architectures in config.json are {', '.join(names) or 'missing'}"
    name = next((name for name in names if name in ModelRegistry.models), None)
    if name is None:
        raise CheckpointError(f"{where}, which {release} does not know; use a model that it serves")
    served: Any = ModelRegistry.models[name].load_model_cls()
    if not _shows_video(served):
        raise CheckpointError(f"{where}, which {release} shows no video; use a thinker that it shows videos")
    if lora and not supports_lora(served):
        raise CheckpointError(
            f"{where}, whose LoRA adapters {release} cannot serve; train its full weights (stage1.lora.rank=0, and no "
            "models.vlm_adapter), or use another thinker"
        )


def _shows_video(served: Any) -> bool:
    """vLLM's class says what stands for a video in a prompt, or that it has only other things."""
    try:
        return bool(served.get_placeholder_str("video", 1))
    except (AttributeError, ValueError):
        return False


def require_same_tokens(path: str, processor: Any, ours: Tensor, theirs: Sequence[int]) -> None:
    """Raise CheckpointError where vLLM read a prompt in other tokens than the processor makes.

    The tokens that the video's features replace may differ in kind, as image tokens and video tokens do, not in number.

    Args:
        path: begins the message.
        processor: the model's, which names those tokens.
        ours: (P,) the processor's token ids.
        theirs: vLLM's.
    """
    seen = placeholder_ids(processor)
    one, other = (["video" if i in seen else i for i in ids] for ids in (ours.tolist(), theirs))
    if one == other:
        return
    at = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
    raise CheckpointError(
        f"{path}: vLLM reads a prompt in {len(other)} tokens and the processor in {len(one)}; they part at token {at} "
        f"({_shown(other, at)} and {_shown(one, at)}). The learner would score another text than was sampled from: compare "
        "processor_config.json and chat_template.jinja with the published model's"
    )


def _shown(ids: Sequence[Any], at: int) -> str:
    return str(list(ids[at : at + 3]))
