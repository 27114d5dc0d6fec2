"""The tiny pair from random weights.

For: architectures small enough for two CPU cores and their training on the toy world.
Not for: fine-tuning (``pipeline.sft``).
Begin with ``pretraining``.
"""

from .pretraining import PARTS, Effort, pretrain

__all__ = ["PARTS", "Effort", "pretrain"]
