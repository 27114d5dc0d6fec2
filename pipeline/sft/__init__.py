"""Supervised fine-tuning of either model, before Joint-GRPO.

For: Ray Train with FSDP2 and Ray Data, captions of the data, the two models' own items.
Not for: gradients (``actors.learner.supervised``).
Begin with ``finetuning``.
"""

from pipeline.sft.finetuning import run_sft
from pipeline.sft.settings import SftResult, SftSettings, sft_settings

__all__ = ["SftResult", "SftSettings", "run_sft", "sft_settings"]
