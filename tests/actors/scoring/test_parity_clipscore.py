"""CLIP-T, CLIPScore and CLIP-V against torchmetrics' CLIPScore, from frames and captions, with the committed CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

import pipeline
from actors.scoring.clip import ClipScorer
from actors.scoring.scorer import Scorer
from pipeline.data.toy import make_sample

FOLDER = Path(pipeline.__file__).parent / "assets" / "tiny" / "clip"


class TensorFeatures(CLIPModel):
    """Stock CLIP whose features are tensors, as torchmetrics expects them; this transformers wraps them."""

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        return super().get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return super().get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(ClipScorer(FOLDER))


@pytest.fixture(scope="module")
def clip_score() -> Any:
    """torchmetrics' CLIPScore on the same folder, by its hook for one's own model."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    def load() -> tuple[CLIPModel, CLIPProcessor]:
        return TensorFeatures.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)

    return CLIPScore(model_name_or_path=load)


def images(frames: np.ndarray) -> list[torch.Tensor]:
    return list(torch.from_numpy(frames.copy()).permute(0, 3, 1, 2))


def measured(metric: Any, source: Sequence[Any], target: Sequence[Any]) -> tuple[float, float]:
    """Return the mean cosine over the pairs, and torchmetrics' score, which cuts it at 0; both ÷ 100."""
    metric.reset()
    with torch.inference_mode():
        metric.update(list(source), list(target))
        return float(metric.score / metric.n_samples) / 100, float(metric.compute()) / 100


def clips() -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Clips, true clips and captions: toy samples with right and wrong captions, and noise of other sizes."""
    samples = [make_sample(i, "test") for i in range(6)]
    found = [(s.target_frames, s.target_frames, samples[(i + i % 2) % 6].caption) for i, s in enumerate(samples)]
    for i, shape in enumerate([(1, 32, 32), (9, 48, 70), (5, 90, 40)]):
        noise = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        found += [(noise, samples[i].target_frames[: len(noise)], samples[i].caption), (noise, noise, "up and away")]
    return found


def test_clip_t_and_clip_score_equal_torchmetrics(scorer: Scorer, clip_score: Any, request_for: Any) -> None:
    cosines = []
    for clip, _, caption in clips():
        request = request_for(0, ("clip_t", "clip_score"), clip=clip, caption=caption)
        values = scorer.score([request])[0].value.values
        cosine, score = measured(clip_score, images(clip), [caption] * len(clip))
        assert values["clip_t"] == pytest.approx(cosine, abs=2e-6)
        assert values["clip_score"] == pytest.approx(score, abs=2e-6)
        cosines.append(cosine)
    assert min(cosines) < -0.05 < 0.5 < max(cosines), "the comparison must have met both signs"


def test_clip_v_equals_torchmetrics_on_pairs_of_frames(scorer: Scorer, clip_score: Any, request_for: Any) -> None:
    cosines = []
    for clip, truth, _ in clips():
        request = request_for(0, ("clip_v",), clip=clip, target_frames=truth)
        cosine, _ = measured(clip_score, images(clip), images(truth))
        assert scorer.score([request])[0].value.values["clip_v"] == pytest.approx(cosine, abs=2e-6)
        cosines.append(cosine)
    assert min(cosines) < 0.5 < max(cosines)
