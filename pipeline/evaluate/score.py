"""Score any systems' predictions on the same samples: the paper's metrics, the alarms, and the toy world's own judges.

Responsible for what is asked of the scorer and of the toy world per answer. The reward pool scores in a run
(``score=pool.submit``), a scorer in this process elsewhere; means and layout are ``table``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from actors.policy.cache import content_key
from actors.pool.errors import SampleFailed
from actors.records import Sample, ScoreRequest, Scores
from actors.scoring.components import VIDEO_FEATURES
from actors.scoring.video import VideoExtractor
from cluster.errors import DataError
from pipeline.data import toy
from pipeline.data.video import VideoLimits
from pipeline.evaluate.figures import Answered
from pipeline.evaluate.predictions import Prediction, check_cover
from pipeline.evaluate.table import EvaluationTable, build_table
from pipeline.stages.requests import score_request
from rewards.alarms import AlarmSettings

Score = Callable[[ScoreRequest], Awaitable[Scores]]
"""Scores one request or raises; a reward pool's ``submit`` is one."""

log = logging.getLogger(__name__)

TEXT_METRICS = ("rouge_l",)
CLIP_METRICS = ("clip_v", "clip_t_truth", VIDEO_FEATURES)
IN_FLIGHT = 32


async def score_predictions(
    systems: Mapping[str, Sequence[Prediction]],
    samples: Sequence[Sample],
    score: Score,
    *,
    extractor: str,
    video: VideoExtractor | None = None,
    limits: VideoLimits | None = None,
    rewards: Sequence[str] = (),
    seed: int = 0,
    compare: tuple[str, str] | None = None,
    settings: AlarmSettings | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> EvaluationTable:
    """Return the table of ``systems`` (name → predictions) on ``samples``.

    ``extractor`` names the Fréchet features that ``score`` gives (``Scorer.fvd_extractor``); with ``video`` the
    features are that extractor's instead. ``rewards``: further components that every clip is scored by. ``compare`` and
    ``settings``: see ``table.build_table``. ``on_done`` is called after each answer. At most 32 answers are decoded and in flight.
    An answer whose video cannot be decoded is one without a video, and a warning says so.

    A component that cannot be computed for an answer (SampleFailed or DataError of ``score``) is left out there, never
    counted as a bad answer; table and log say how often and why. Raises DataError for one that cannot be computed for any
    answer, when a system leaves out a sample, or none of its videos can be decoded; other errors of ``score`` are raised as
    they are.
    """
    ids = [sample.id for sample in samples]
    if not ids or len(set(ids)) != len(ids):
        raise DataError(
            f"evaluation needs at least one sample and distinct ids, got {len(ids)} with {len(set(ids))} ids"
        )
    covered = {name: check_cover(name, predictions, ids) for name, predictions in systems.items()}
    room = asyncio.Semaphore(IN_FLIGHT)
    videos = None if video is None else _VideoFeatures(video)

    async def one(sample: Sample, prediction: Prediction, broken: list[str]) -> Answered:
        async with room:
            loaded, problem = await asyncio.to_thread(prediction.watched, sample.target_frames, limits)
            if problem is not None:
                broken.append(problem)
            answered = await _answer(sample, loaded, score, videos, rewards)
        on_done()
        return answered

    found: dict[str, list[Answered]] = {}
    for name, by_id in covered.items():
        broken: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(s, p, broken)) for s in samples for p in by_id[s.id]]
        except ExceptionGroup as errors:
            raise _first(errors) from None
        if broken:
            told = f"{len(broken)} of {len(tasks)} answers of {name!r} have a video that cannot be decoded: {broken[0]}"
            if len(broken) == len(tasks):
                raise DataError(told)
            log.warning("%s. They are scored as answers without a video", told)
        found[name] = [task.result() for task in tasks]
    _judge_lost(found)
    return build_table(found, video.name if video else extractor, seed=seed, compare=compare, settings=settings)


class _VideoFeatures:
    """An extractor's features, one clip at a time and beside the event loop; those of ground truth are made once."""

    def __init__(self, extractor: VideoExtractor) -> None:
        self._extractor = extractor
        self._one = asyncio.Lock()
        self._truth: dict[str, np.ndarray] = {}  # by the frames

    async def of(self, sample: Sample, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of an answer to ``sample`` and of its true clip."""
        async with self._one:
            key = content_key(sample.target_frames)
            if key not in self._truth:
                self._truth[key] = await asyncio.to_thread(self._extractor, sample.target_frames)
            return {"clip": await asyncio.to_thread(self._extractor, frames), "target": self._truth[key]}


async def _answer(
    sample: Sample, prediction: Prediction, score: Score, videos: _VideoFeatures | None, rewards: Sequence[str]
) -> Answered:
    request = _request(sample, prediction, rewards)
    lost: dict[str, str] = {}
    try:
        scores = await score(request)
    except (SampleFailed, DataError):
        scores, lost = await _one_by_one(request, score)
    values = {"answered": float(prediction.frames is not None and bool(prediction.caption)), **scores.values}
    values |= {name: value for name, value in scores.diagnostics.items() if name != "copy"}
    values |= _toy_judgement(sample, prediction)
    features = dict(scores.features)
    if videos is not None and prediction.frames is not None:
        features = await videos.of(sample, prediction.frames)
    return Answered(
        sample.id, prediction.index, sample.kind, prediction.caption, sample.caption, values, features, lost
    )


async def _one_by_one(request: ScoreRequest, score: Score) -> tuple[Scores, dict[str, str]]:
    """Return the components of ``request`` that can be computed, and why the others cannot."""
    found = Scores(request.sample_id, request.index, {})
    lost: dict[str, str] = {}
    for name in request.components:
        try:
            one = await score(replace(request, components=(name,)))
        except (SampleFailed, DataError) as error:
            lost[name] = str(error)
            continue
        found = replace(
            found,
            values=found.values | one.values,
            diagnostics=found.diagnostics | one.diagnostics,
            features=found.features | one.features,
        )
    return found, lost


def _judge_lost(found: Mapping[str, Sequence[Answered]]) -> None:
    """Log what could not be computed; raise DataError for a component that no answer has: that is no odd sample."""
    answers = [answer for system in found.values() for answer in system]
    lost = Counter((name, reason) for answer in answers for name, reason in answer.lost.items())
    for (name, reason), count in lost.items():
        log.warning("evaluation: %s of %d answers cannot be computed: %s", name, count, reason)
    for name in dict.fromkeys(name for name, _ in lost):
        if not any(name in answer.values or (name == VIDEO_FEATURES and answer.features) for answer in answers):
            reason, count = next((reason, lost[name, reason]) for other, reason in lost if other == name)
            raise DataError(f"{name} cannot be computed for any answer, {count} times because: {reason}")


def _request(sample: Sample, prediction: Prediction, rewards: Sequence[str]) -> ScoreRequest:
    components = list(TEXT_METRICS)
    if prediction.text:
        components.append("format")
    if prediction.frames is not None:
        components += CLIP_METRICS
        if prediction.caption.strip():
            components.append("clip_t")
        components += [name for name in rewards if name not in components]
    return score_request(
        sample, prediction.index, tuple(components), prediction.text, prediction.caption, prediction.frames
    )


def is_toy(sample: Sample) -> bool:
    """Whether the toy world's judges know this sample."""
    try:
        meta = json.loads(sample.meta) if sample.meta else {}
    except json.JSONDecodeError:
        return False
    return isinstance(meta, dict) and meta.get("world") == "toy"


def _toy_judgement(sample: Sample, prediction: Prediction) -> dict[str, float]:
    """Return what only the toy world can tell, nothing for other samples; an unanswered question fails it all.

    Clips of another shape than the toy world's cannot be judged, so ``follow`` and ``faithful`` are left out for them.
    """
    if not is_toy(sample):
        return {}
    scene, event = toy.read_meta(sample.meta)
    named = toy.parse_caption(prediction.caption)
    found = {
        "drawable": float(toy.drawable(prediction.caption)),
        "event": float(named == event),
    }
    frames = prediction.frames
    if frames is None:
        return found | {"follow": 0.0, "faithful": 0.0}
    if frames.shape == (toy.FRAMES, toy.SIZE, toy.SIZE, 3):
        shown = toy.shown_event(scene, frames)  # one look serves both: toy.follow and toy.follow_caption
        found["follow"] = float(shown == event)
        found["faithful"] = float(named is not None and shown == named)
    return found


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """Return the first error of a task group: one is enough to act on, and callers know its class."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
