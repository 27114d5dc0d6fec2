"""The held-out questions that rows are asked: the table's, and for rows with ``asked`` the same changed.

Every row answers about the same samples with the same noise, so that rows that are asked differently compare sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.toy.language import UNSEEN_WORDING, reworded
from pipeline.data.toy.shards import ensure_toy
from pipeline.evaluate.predictions import Prediction
from pipeline.reproduce.spec import Asked, Experiment, Row


def make_samples(experiment: Experiment, out: Path) -> None:
    """Write what ``experiment`` learns from and asks: ``out``/data, and beside it the samples of every other background."""
    count, drawable, extra = experiment.test_samples, experiment.drawable_captions, experiment.sft_samples
    ensure_toy(out / "data", experiment.train_samples, count, sft=extra, artist=extra, drawable=drawable)
    for background in experiment.backgrounds:
        ensure_toy(data_folder(out, background), 1, count, background=background, drawable=drawable)


def data_folder(out: Path, background: str | None) -> Path:
    """Return where the splits with ``background`` lie, with the scenes' own where it is None."""
    return out / (f"data-{background}" if background else "data")


def background_of(row: Row) -> str | None:
    """Return the background of the scenes that ``row`` is asked about; None: the scenes' own."""
    return row.asked.background if row.asked else None


def as_asked(config: RunConfig, row: Row) -> RunConfig:
    """Return ``config`` with the artist's conditioning as ``row`` has it."""
    if row.asked is None or row.asked.conditioning is None:
        return config
    video = config.video.model_copy(update={"conditioning": row.asked.conditioning})
    return config.model_copy(update={"video": video})


def said(row: Row) -> Callable[[str], str]:
    """Return what the artist is given in place of the thinker's caption."""
    unseen = row.asked is not None and row.asked.wording == "unseen"
    return (lambda caption: reworded(caption, UNSEEN_WORDING)) if unseen else (lambda caption: caption)


def shown(row: Row, prediction: Prediction) -> Prediction:
    """Return what is judged in place of the answer ``prediction``."""
    if row.asked is None or not row.asked.held or prediction.frames is None:
        return prediction
    return replace(prediction, frames=np.repeat(prediction.frames[:1], len(prediction.frames), axis=0))


def in_words(asked: Asked) -> str:
    """Return what is asked otherwise, for the report."""
    how = asked.conditioning
    parts = [
        asked.wording and f"captions in {asked.wording} words",
        asked.background and f"background {asked.background}",
        how and f"conditioning: references {how.references}, {how.take} latent frames, time {how.time}",
        asked.held and "clips held at their first frame",
    ]
    return ", ".join(part for part in parts if part)
