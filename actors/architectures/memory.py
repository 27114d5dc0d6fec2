"""What training a shape keeps in memory beside its inputs: weights, gradients, optimizer state, activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.architectures.architecture import Architecture
from actors.architectures.cost import attention_widths, lora_parameters, text_config


@dataclass(frozen=True)
class TrainingBytes:
    """Memory of one learner rank by what it is for, in bytes."""

    parameters: float  # its shard, float32
    gathered: float  # the units that are whole at once, in the compute dtype
    gradients: float
    optimizer: float  # AdamW: two moments, float32
    reference: float  # a frozen copy, where full weights are trained with a KL
    activations: float  # what the backward pass reads

    @property
    def total(self) -> float:
        """All of it; the allocator's fragments and the libraries' workspaces come on top."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.reference + self.activations


def learner_bytes(
    model: Architecture,
    *,
    tokens: int,
    parameters: int,
    lora_rank: int,
    ranks: int = 1,
    element: int = 2,
    checkpointing: bool = True,
    logits: int = 0,
    passes: int = 1,
    kl: bool = False,
    text: int | None = None,
) -> TrainingBytes:
    """Return the memory of one rank of a learner group for a micro-batch.

    Args:
        tokens: of the micro-batch in the artist's transformer, or in the language model (prompts and completions).
        parameters: of the trained module (``Architecture.parameters``).
        lora_rank: 0 trains all weights.
        ranks: that the parameters are sharded over.
        element: bytes of the compute dtype, 2 or 4.
        checkpointing: only the blocks' inputs are kept, and one block at a time is computed anew.
        logits: completion tokens of the micro-batch (VLM).
        passes: window steps whose graphs are alive together (VDM).
        kl: whether a reference is needed; the adapter's is free.
        text: caption tokens of the micro-batch (VDM); None is one caption's.
    """
    trained = lora_parameters(model, lora_rank) if lora_rank else parameters
    stored = parameters + (trained if lora_rank else 0)
    if model.role == "vdm":
        shapes = model.shapes
        d, layers = shapes.width, shapes.layers
        block = shapes.block_bytes(tokens, shapes.text_tokens if text is None else text, element, bool(lora_rank))
        shared = 6.0 * d * tokens * element + 2 * d * tokens * element  # per-token modulation, embedding and output
        unit = parameters / (layers + 1)
        head = 0.0
    else:
        c = text_config(model)
        d, layers = int(c["hidden_size"]), int(c["num_hidden_layers"])
        block = _language_block_bytes(c, tokens, element, bool(lora_rank))
        shared = 2.0 * d * tokens * element
        unit = float(int(c["vocab_size"]) * d)  # the embedding, gathered with the root
        # Logits as the model gives them and gathered, then in float32: biased, tempered, their exponentials, gradients.
        head = float(logits * int(c["vocab_size"]) * (2 * element + 4 * 4))
    kept = layers * (d * tokens * element if checkpointing else block) + (block if checkpointing else 0)
    return TrainingBytes(
        parameters=4.0 * stored / ranks,
        gathered=2.0 * element * unit if ranks > 1 or element != 4 else 0.0,
        gradients=4.0 * trained / ranks,
        optimizer=8.0 * trained / ranks,
        reference=4.0 * parameters / ranks if kl and not lora_rank else 0.0,
        activations=passes * (kept + shared) - (passes - 1) * (block if checkpointing else 0) + head,
    )


def _language_block_bytes(c: Mapping[str, Any], tokens: int, element: int, lora: bool) -> float:
    """Return what autograd keeps of one decoder layer."""
    d, q, kv, ffn = int(c["hidden_size"]), *attention_widths(c), int(c["intermediate_size"])
    own = element * ((2 if lora else 4) * d + 2 * q + 2 * kv + 4 * ffn) + 8 * d
    if "head_dim" in c:  # Qwen3 normalises queries and keys in float32
        own += (4 if lora else 4 + element) * (q + kv)
    return float(tokens * own)
