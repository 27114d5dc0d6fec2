"""Supervised fine-tuning of either model, on Ray Train with FSDP2 and Ray Data: what comes before Joint-GRPO."""

from pipeline.sft.run import run_sft
from pipeline.sft.settings import SftResult, SftSettings, sft_settings

__all__ = ["SftResult", "SftSettings", "run_sft", "sft_settings"]
