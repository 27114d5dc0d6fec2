"""Answer held-out samples with the pair in the pools: caption, then clip. Scoring the answers is ``pipeline.evaluate``'s other half.

Every system that is compared answers with the same noise per sample, so that differences are the systems' own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from actors.pool.errors import SampleFailed
from actors.records import Completion, Sample, derive_seed
from pipeline.config import RunConfig
from pipeline.evaluate.predictions import Prediction
from pipeline.fleet.open import Fleet
from pipeline.stages.requests import completion_request, render, render_request


async def answer_samples(
    config: RunConfig,
    fleet: Fleet,
    samples: Sequence[Sample],
    *,
    said: Callable[[str], str] = str,
    on_done: Callable[[], None] = lambda: None,
) -> list[Prediction]:
    """Return one prediction per sample, in order; a sample that cannot be answered has an empty caption and no clip.

    ``said``: see :func:`answer_one`.
    """

    async def answer(sample: Sample) -> Prediction:
        prediction = await answer_one(config, fleet, sample, said)
        on_done()
        return prediction

    return list(await asyncio.gather(*(answer(sample) for sample in samples)))


async def answer_one(config: RunConfig, fleet: Fleet, sample: Sample, said: Callable[[str], str] = str) -> Prediction:
    """Answer one sample: the thinker's caption, drawn by the artist as an ODE.

    ``said`` makes of the caption the one that is drawn, which is the answer's.
    """
    section = config.evaluate
    request = completion_request(sample, section.text, derive_seed(section.seed, sample.id, "text"))
    try:
        completions: list[Completion] = await fleet.vlm.submit(request)
        text = completions[0].text
        answer = config.models.prompt.answers.parse(text)
        if answer is None:
            return Prediction(id=sample.id, caption="", text=text, frames=None)
        caption = said(answer.caption)
        noise = derive_seed(section.seed, sample.id, "noise")
        clip = await render(fleet, render_request(config, sample, caption, 0, section.render, noise_seed=noise))
    except SampleFailed as error:
        return Prediction(id=sample.id, caption="", text=str(error), frames=None)
    return Prediction(id=sample.id, caption=caption, text=text, frames=np.asarray(clip.frames))
