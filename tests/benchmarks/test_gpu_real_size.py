"""The benchmark of the real size runs from end to end at the tiny one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow


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
        "stage2_update_all_steps",
        "stage1_update",
        "stage1_update_shared",
    }
    compared = figures["compared"]
    assert set(compared) == {"shared_times", "channels_last", "stock_pipeline", "window_update"}
    assert compared["shared_times"]["largest_difference"] == 0.0  # on a CPU; a GPU's sums may take another order
    assert compared["channels_last"]["largest_difference"] <= 1.0
    # One group and window: the learner's steps are the sampler's, in whichever batch.
    assert figures["parts"]["stage2_update"]["largest_gap_of_two_passes"] == 0.0
    one_rank = figures["learner"]
    assert one_rank["ratio_max_dev"] == 0.0 and one_rank["grad_norm"] > 0
    assert one_rank["moved"] == one_rank["restored"] == 1.0
    assert figures["matmul_tflop_per_s"] > 0
    for part in figures["parts"].values():
        assert part["seconds"] > 0 and part["tflop"] > 0
    assert figures["parts"]["stage2_update_all_steps"]["tflop"] > figures["parts"]["stage2_update"]["tflop"]
    # The same steps and the same transformer: a window changes what is kept, not what is computed.
    assert figures["parts"]["sample_window"]["tflop"] == figures["parts"]["sample_full_sde"]["tflop"]
