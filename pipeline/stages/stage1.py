"""Stage 1, visualization-friendly VLM tuning (arXiv 2511.16669): the VLM is trained through the frozen artist.

One coroutine carries one sample's group from completions through rendering to scores; groups do not wait for one another.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from actors.pool.errors import SampleFailed
from actors.records import Clip, Completion, Experience, RenderRequest, Sample, Scores, VlmExperience, derive_seed
from pipeline.config import RunConfig
from pipeline.fleet.open import Fleet
from pipeline.stages.feed import SampleFeed
from pipeline.stages.groups import Group, LeftOut, Member, RolloutBatch, Span
from pipeline.stages.refill import draw_key
from pipeline.stages.requests import (
    collect,
    completion_request,
    draws,
    judge_group,
    render,
    render_request,
    render_seeds,
    score,
    score_request,
    timed,
)

Drawing = tuple[RenderRequest, asyncio.Task[tuple[Clip, Span]]]
"""What was asked of the artist, and the clip with when it was drawn."""


@dataclass
class Stage1:
    """How stage 1 samples groups and what its learner reads."""

    config: RunConfig
    fleet: Fleet
    name = "stage1"
    title = "stage 1 · thinker"
    policies: ClassVar[tuple[str, ...]] = ("vlm",)

    @property
    def section(self):
        """The stage's part of the configuration."""
        return self.config.stage1

    async def draw(self, feed: SampleFeed, step: int, count: int, wave: int = 0) -> list[asyncio.Task[Group | None]]:
        """Draw ``count`` samples and start one coroutine per group; ``wave`` > 0 refills the step."""
        samples, key = await feed.draw(count), draw_key(step, wave)
        return [
            asyncio.create_task(self.group(sample, key), name=f"{self.name} step {key} {sample.id}")
            for sample in samples
        ]

    async def group(self, sample: Sample, step: str) -> Group | None:
        """Complete, parse, render and score one group; it has no members when the sample itself is unusable."""
        section, seed = self.section, derive_seed(self.config.seed, self.name, step, sample.id, "text")
        request = completion_request(sample, section.text, seed, section.rollout.group_size)
        try:
            completions, text = await timed(self.fleet.vlm.submit(request))
        except SampleFailed as error:
            return Group(sample, (), (str(error),) * section.rollout.group_size)
        answers = self.config.models.prompt.answers
        captions = [answer.caption if (answer := answers.parse(c.text)) else None for c in completions]
        drawn = draws(self.fleet, tuple(section.rewards.weights))
        keys = [caption if section.dedupe else (caption, i) for i, caption in enumerate(captions)]
        renders: dict[object, Drawing] = {}
        for i, (key, caption) in enumerate(zip(keys, captions, strict=True)):
            if drawn and caption is not None and key not in renders:
                asked = self._render(sample, caption, i, step)
                renders[key] = asked, asyncio.create_task(timed(render(self.fleet, asked)))
        members = [
            self._member(sample, i, c, caption, renders.get(key), {"text": seed}, {"text": text})
            for i, (c, caption, key) in enumerate(zip(completions, captions, keys, strict=True))
        ]
        done = await asyncio.gather(*members, return_exceptions=True)
        return await judge_group(self.fleet, collect(sample, done), tuple(section.rewards.weights))

    async def _member(
        self,
        sample: Sample,
        index: int,
        completion: Completion,
        caption: str | None,
        drawing: Drawing | None,
        seeds: dict[str, int],
        spans: dict[str, Span],
    ) -> Member:
        clip = None
        if drawing is not None:
            asked, rendering = drawing
            clip, took = await rendering
            seeds, spans = seeds | render_seeds(asked), spans | {"render": took}
        names = tuple(self.section.rewards.weights)
        wanted = names if caption is not None else tuple(n for n in names if n == "format")
        frames = None if clip is None else clip.frames
        request = score_request(sample, index, wanted, completion.text, caption or "", frames)
        scores, scored = await timed(score(self.fleet, sample, request))
        # A malformed answer has no caption and no video: what judges them is 0 by definition, not by imputation.
        values = {name: scores.values.get(name, 0.0) for name in names} if caption is None else scores.values
        return Member(
            index,
            caption or "",
            Scores(sample.id, index, values, scores.diagnostics),
            completion,
            clip,
            completion.weights_version,
            seeds,
            spans | {"score": scored},
        )

    def experiences(self, batch: RolloutBatch, policy: str) -> list[Experience]:
        """Return what the learner reads, in a fixed order."""
        return completion_experiences(batch)

    def lost(self, step: int) -> list[str]:
        """Return nothing: each sample has its group, which says what was lost in it."""
        return []

    def passed_over(self, step: int) -> list[LeftOut]:
        """Return nothing: each sample has its group."""
        return []

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """Return what only stage 1 measures."""
        answers = self.config.models.prompt.answers
        kept = [answers.reward(m.completion.text) for g in batch.groups for m in g.members if m.completion is not None]
        return {"rollout/format_rate": float(np.mean(kept))} if kept else {}

    def _render(self, sample: Sample, caption: str, index: int, step: str):
        # One noise per group: the caption alone makes the difference, and equal captions are equal clips.
        seed = derive_seed(self.config.seed, self.name, step, sample.id, "noise")
        return render_request(self.config, sample, caption, index, self.section.render, noise_seed=seed)


def completion_experiences(batch: RolloutBatch) -> list[Experience]:
    """Return every completion of ``batch`` with its advantage, in a fixed order."""
    items: list[Experience] = []
    for group, advantages in zip(batch.groups, batch.advantages, strict=True):
        for member, advantage in zip(group.members, advantages, strict=True):
            c = member.completion
            assert c is not None
            items.append(
                VlmExperience(
                    sample_id=group.sample.id,
                    index=member.index,
                    asked=group.sample.asked,
                    token_ids=c.token_ids,
                    rollout_logprobs=c.logprobs,
                    advantage=float(advantage),
                )
            )
    return items
