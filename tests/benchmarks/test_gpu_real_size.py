"""The benchmark of the real size runs from end to end at the tiny one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def test_every_part_is_measured_at_the_tiny_size() -> None:
    path = Path(__file__).with_name("gpu_real_size.py")
    spec = importlib.util.spec_from_file_location("gpu_real_size", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    figures = module.measure(module.SIZES["tiny"], torch.device("cpu"))
    assert set(figures["parts"]) == {
        "embed_caption",
        "encode_references",
        "sample_full_sde",
        "sample_window",
        "decode",
        "clip_images",
        "stage2_update",
        "stage1_update",
    }
    assert figures["matmul_tflop_per_s"] > 0
    for part in figures["parts"].values():
        assert part["seconds"] > 0 and part["tflop"] > 0
    # The same steps and the same transformer: a window changes what is kept, not what is computed.
    assert figures["parts"]["sample_window"]["tflop"] == figures["parts"]["sample_full_sde"]["tflop"]
