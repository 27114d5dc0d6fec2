"""A tiny DINOv2 with random weights, and how encoders of that size are given their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

SIZE = 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGES: dict[str, Any] = {
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": MEAN,
    "image_std": STD,
}


def tiny_dino(folder: Path) -> Dinov2Model:
    """Save a tiny random DINOv2 with its preprocessor into ``folder``; return the library's own class."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(image_size=SIZE, patch_size=8, **small))
    model.save_pretrained(folder)
    BitImageProcessor(**IMAGES).save_pretrained(folder)
    return model.eval()
