"""What the pools are asked about a sample, a completion, a clip and its scores; the same for training, evaluation and answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from actors.pool.errors import SampleFailed
from actors.records import Clip, CompletionRequest, RenderRequest, Sample, ScoreRequest, Scores, SdeSpec
from actors.scoring.components import TEXT_ONLY
from actors.vdm.frames import conditioning_frames
from pipeline.config.schema import RunConfig, VideoSection
from pipeline.config.stages import RenderSection, TextSamplingSection
from pipeline.stages.groups import Group, Member, Span

if TYPE_CHECKING:  # `vans answer` draws without pools
    from pipeline.fleet.open import Fleet
    from pipeline.fleet.scoring import Scoring

T = TypeVar("T")


async def timed(work: Awaitable[T]) -> tuple[T, Span]:
    """Return what ``work`` gives, and when it was under way."""
    began = time.monotonic()
    found = await work
    return found, Span(began, time.monotonic() - began)


def completion_request(sample: Sample, text: TextSamplingSection, seed: int, n: int = 1) -> CompletionRequest:
    """Return the request for ``n`` answers of the thinker to the question of ``sample``."""
    return CompletionRequest(
        sample_id=sample.id,
        asked=sample.asked,
        n=n,
        seed=seed,
        temperature=text.temperature,
        max_tokens=text.max_tokens,
        top_p=text.top_p,
    )


def artist_frames(video: VideoSection, sample: Sample) -> np.ndarray:
    """Return the frames of ``sample``'s input that the artist is conditioned on, uint8 (n, H, W, 3)."""
    return conditioning_frames(sample.context, video.reference_frames, video.conditioning)


def render_request(
    config: RunConfig,
    sample: Sample,
    caption: str,
    index: int,
    render: RenderSection,
    *,
    noise_seed: int,
    sde: SdeSpec | None = None,
    sde_seed: int = 0,
    ends: bool = False,
) -> RenderRequest:
    """Return the request that draws ``caption`` in the scene of ``sample``."""
    return RenderRequest(
        sample_id=sample.id,
        index=index,
        caption=caption,
        reference_frames=artist_frames(config.video, sample),
        num_frames=config.video.num_frames,
        steps=render.steps,
        guidance=render.guidance,
        noise_seed=noise_seed,
        sde_seed=sde_seed,
        sde=sde,
        ends=ends,
    )


async def render(fleet: Fleet, request: RenderRequest) -> Clip:
    """Return the clip of ``request``; with an embed pool, what it is conditioned on is asked for first, and goes along."""
    if fleet.conditions is None:
        clip: Clip = await fleet.vdm.submit(request)
        return clip
    request = replace(request, condition=await fleet.conditions.of(request))
    clip = await fleet.vdm.submit(request)
    return clip if clip.trajectory is None else replace(clip, condition=request.condition)


def render_seeds(request: RenderRequest) -> dict[str, int]:
    """Return what ``request`` draws with: the seed of the initial noise, and that of the SDE's steps where there are any."""
    return {"noise": request.noise_seed} | ({"sde": request.sde_seed} if request.sde is not None else {})


def score_request(
    sample: Sample, index: int, components: tuple[str, ...], text: str, caption: str, frames: np.ndarray | None
) -> ScoreRequest:
    """Return the request for the scores of one answer to ``sample``; ``frames`` uint8 (T, H, W, 3) are those of its clip."""
    return ScoreRequest(
        sample_id=sample.id,
        index=index,
        components=components,
        text=text,
        caption=caption,
        reference_caption=sample.caption,
        target_frames=sample.target_frames,
        last_input_frame=sample.context[-1],
        clip=frames,
        question=sample.question,
    )


def draws(fleet: Fleet, components: Sequence[str]) -> bool:
    """Return whether an answer has to be drawn for one of ``components``: else nobody would look at the clip."""
    if fleet.scoring is None:
        return not TEXT_ONLY.issuperset(components)
    return fleet.scoring.draws(components)


async def score(fleet: Fleet, sample: Sample, request: ScoreRequest) -> Scores:
    """Return the scores of ``request`` about ``sample``, without those of components that judge whole groups."""
    if fleet.scoring is None:
        scores: Scores = await fleet.reward.submit(request)
        return scores
    return await fleet.scoring.score(_seeing(fleet.scoring, sample, request))


async def judge_group(fleet: Fleet, group: Group, components: Sequence[str]) -> Group:
    """Return ``group`` with the values of those ``components`` that judge whole groups.

    A member without a caption was not asked about: what judges it is 0 by definition. A group that cannot be judged loses all of
    its members, for that reason.
    """
    if fleet.scoring is None:
        return group
    members, sample = list(group.members), group.sample
    for name in fleet.scoring.of_groups(components):
        places = [i for i, member in enumerate(members) if member.caption]
        values: list[float] = []
        if places:
            asked = [_request_of(sample, members[i], name, group.text) for i in places]
            asked = [_seeing(fleet.scoring, sample, request) for request in asked]
            try:
                values = await fleet.scoring.score_group(name, asked)
            except SampleFailed as error:
                return replace(group, members=(), failures=(*group.failures, *[str(error)] * len(members)))
        found = dict(zip(places, values, strict=True))
        for i, member in enumerate(members):
            scores = replace(member.scores, values=member.scores.values | {name: found.get(i, 0.0)})
            members[i] = replace(member, scores=scores)
    return replace(group, members=tuple(members))


def _request_of(sample: Sample, member: Member, component: str, text: str) -> ScoreRequest:
    said = text if member.completion is None else member.completion.text
    frames = None if member.clip is None else member.clip.frames
    return score_request(sample, member.index, (component,), said, member.caption, frames)


def _seeing(scoring: Scoring, sample: Sample, request: ScoreRequest) -> ScoreRequest:
    """Return ``request`` with the input video, where a component looks at it."""
    if not scoring.sees(request.components, "input_video"):
        return request
    return replace(request, input_frames=sample.input_frames)


def collect(sample: Sample, done: list[Member | BaseException], text: str = "") -> Group:
    """Return the group of the members that succeeded; a data failure leaves the group, anything else is raised.

    ``text`` is what the frozen thinker wrote for all of them.
    """
    members, failures = [], []
    for result in done:
        if isinstance(result, SampleFailed):
            failures.append(str(result))
        elif isinstance(result, BaseException):
            raise result
        else:
            members.append(result)
    return Group(sample, tuple(members), tuple(failures), text)
