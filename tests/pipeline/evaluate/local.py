"""Predictions scored without Ray: CLIP in this process, and ground truth as a system."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from actors.failures import Failure
from actors.records import Sample, ScoreRequest
from actors.scoring.clip import ClipScorer
from actors.scoring.scorer import Scorer, Scores
from cluster.errors import DataError
from pipeline.data.video import VideoLimits
from pipeline.evaluate.predictions import Prediction
from pipeline.evaluate.score import VideoExtractor, score_predictions
from pipeline.evaluate.table import EvaluationTable


def evaluate_predictions(
    systems: Mapping[str, Sequence[Prediction]],
    samples: Sequence[Sample],
    clip: ClipScorer,
    *,
    video: VideoExtractor | None = None,
    limits: VideoLimits | None = None,
    seed: int = 0,
    compare: tuple[str, str] | None = None,
) -> EvaluationTable:
    """As :func:`score_predictions`, with CLIP in this process. Not for use inside a running event loop."""
    local = LocalScore(clip)
    name = local.scorer.fvd_extractor
    return asyncio.run(
        score_predictions(
            systems, samples, local, extractor=name, video=video, limits=limits, seed=seed, compare=compare
        )
    )


class LocalScore:
    """A :data:`Score` in this process; raises DataError for what cannot be scored and RuntimeError for a bug."""

    def __init__(self, clip: ClipScorer) -> None:
        self.scorer = Scorer(clip)

    async def __call__(self, request: ScoreRequest) -> Scores:
        """Return the scores of ``request``."""
        outcome = self.scorer.score([request])[0]
        if isinstance(outcome, Failure):
            if outcome.kind == "data":
                raise DataError(f"sample {request.sample_id} cannot be scored: {outcome.message}")
            raise RuntimeError(f"scoring sample {request.sample_id} failed: {outcome.message}\n{outcome.traceback}")
        scores: Scores = outcome.value
        return scores


def truth_as_predictions(samples: Iterable[Sample]) -> list[Prediction]:
    """Return ground truth as predictions: the ceiling of every metric, and the check that the metrics are right."""
    return [
        Prediction(s.id, s.caption, f"<think></think><ans>{s.caption}</ans>", np.asarray(s.target_frames))
        for s in samples
    ]
