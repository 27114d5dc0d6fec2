"""Stage 2, context-faithful VDM adaptation (arXiv 2511.16669): the artist is trained against the frozen, tuned thinker.

The thinker writes an anchor caption; anchors that say something else than the ground truth (ROUGE-L below the threshold) are
dropped; for the others the artist samples G trajectories as an SDE.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from actors.pool import SampleFailed
from actors.records import Completion, CompletionRequest, Experience, Sample, SdeSpec, VdmExperience, derive_seed
from actors.vdm.conditioning import select_reference_frames
from actors.vdm.flow_sde import WindowSchedule
from cluster.errors import TrainingError
from pipeline.config import RunConfig
from pipeline.fleet import Fleet
from pipeline.stages.feed import SampleFeed
from pipeline.stages.groups import Group, Member, RolloutBatch
from pipeline.stages.refill import draw_key
from pipeline.stages.rendering import render, render_request
from pipeline.stages.stage1 import collect, score_request
from rewards.format import parse_answer
from rewards.text import rouge_l

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anchor:
    """What the frozen thinker says about a sample, and how close that is to the truth."""

    text: str
    caption: str | None
    rouge_l: float
    failure: str = ""
    """Why the thinker could not be asked."""


class Windowed:
    """What a stage that samples the flow as an SDE has to remember: where its window stands."""

    window: WindowSchedule

    def state(self) -> dict:
        """Return the stage's resumable state: the SDE window."""
        return self.window.state()

    def restore(self, state: dict) -> None:
        """Restore what :meth:`state` returned."""
        self.window.restore(state)

    def after_update(self, step: int) -> None:
        """Move the window."""
        self.window.advance()


@dataclass
class Stage2(Windowed):
    """How stage 2 samples groups and what its learner reads."""

    config: RunConfig
    fleet: Fleet
    name = "stage2"
    title = "stage 2 · artist"
    policies: ClassVar[tuple[str, ...]] = ("vdm",)
    _anchors: dict[str, Anchor] = field(default_factory=dict)
    _seen: dict[int, list[Anchor]] = field(default_factory=dict)  # by step: several may be in flight

    def __post_init__(self) -> None:
        self.window = sde_window(self.config)

    @property
    def section(self):
        """The stage's part of the configuration."""
        return self.config.stage2

    async def draw(self, feed: SampleFeed, step: int, count: int, wave: int = 0) -> list[asyncio.Task[Group | None]]:
        """Draw samples until ``count`` anchors pass the filter; each that passes starts rendering at once.

        A refill (``wave`` > 0) may come back with fewer, or none; the step's own samples may not.
        """
        tasks: list[asyncio.Task[Group | None]] = []
        spec, key = sde_spec(self.config, self.window, step), draw_key(step, wave)
        seen = self._seen.setdefault(step, [])
        for _ in range(self.section.anchor_max_draws):
            samples = await feed.draw(count - len(tasks))
            for sample, anchor in zip(
                samples, await asyncio.gather(*(self._anchor(s, key) for s in samples)), strict=True
            ):
                seen.append(anchor)
                if anchor.caption is None or anchor.rouge_l < self.section.anchor_min_rouge:
                    continue
                name = f"stage2 step {key} {sample.id}"
                tasks.append(asyncio.create_task(self.group(sample, anchor, key, spec), name=name))
            if len(tasks) == count:
                return tasks
        if tasks or wave:
            return tasks
        failures = [a.failure for a in seen if a.failure]
        if len(failures) == len(seen):
            raise TrainingError(
                f"stage2: the thinker could not be asked about any of {len(seen)} samples: {failures[-1]}"
            )
        raise TrainingError(
            f"stage2: no anchor caption out of {len(seen)} reached stage2.anchor_min_rouge={self.section.anchor_min_rouge}; "
            f"best {max((a.rouge_l for a in seen), default=0.0):.2f}. Train stage 1 longer or lower the threshold"
        )

    async def group(self, sample: Sample, anchor: Anchor, step: str, spec: SdeSpec) -> Group | None:
        """Sample, and score, G trajectories of the anchor caption."""
        done = await asyncio.gather(
            *(self._member(sample, anchor, i, step, spec) for i in range(self.section.rollout.group_size)),
            return_exceptions=True,
        )
        return collect(sample, done)

    async def _member(self, sample: Sample, anchor: Anchor, index: int, step: str, spec: SdeSpec) -> Member:
        assert anchor.caption is not None
        seed = (self.config.seed, "stage2", step, sample.id)
        request = render_request(
            self.config,
            sample,
            anchor.caption,
            index,
            self.section.render,
            noise_seed=derive_seed(*seed, "noise", 0 if self.section.sde.same_latent else index),
            sde=spec,
            sde_seed=derive_seed(*seed, "sde", index),
        )
        clip = await render(self.fleet, request)
        names = tuple(self.section.rewards.weights)
        scores = await self.fleet.reward.submit(score_request(sample, index, names, anchor.text, anchor.caption, clip))
        return Member(index, anchor.caption, scores, None, clip, clip.weights_version)

    def experiences(self, batch: RolloutBatch, policy: str) -> list[Experience]:
        """Return what the learner reads, in a fixed order."""
        return trajectory_experiences(batch, self.config.video.reference_frames)

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Return what only stage 2 measures, over the anchors of the oldest step that was drawn: steps end in order."""
        seen = self._seen.pop(min(self._seen), []) if self._seen else []
        kept = [a.rouge_l >= self.section.anchor_min_rouge and a.caption is not None for a in seen]
        start = self.window.start
        metrics = {"sde/window_start": float(start)}
        if seen:
            metrics |= {
                "anchor/kept": float(np.sum(kept)),
                "anchor/kept_ratio": float(np.mean(kept)),
                "anchor/failed": float(sum(bool(a.failure) for a in seen)),
                "anchor/rouge_l": float(np.mean([a.rouge_l for a in seen])),
            }
        return metrics

    async def _anchor(self, sample: Sample, step: str) -> Anchor:
        if self.section.anchor == "truth":
            return Anchor("", sample.caption, 1.0)
        return await self._ask(sample, step)

    async def _ask(self, sample: Sample, step: str) -> Anchor:
        greedy = self.section.text.temperature == 0
        if greedy and sample.id in self._anchors:  # the thinker is frozen, so its greedy answer never changes
            anchor = self._anchors[sample.id]
        else:
            request = CompletionRequest(
                sample_id=sample.id,
                asked=sample.asked,
                n=1,
                seed=derive_seed(self.config.seed, "stage2", step, sample.id, "anchor"),
                temperature=self.section.text.temperature,
                max_tokens=self.section.text.max_tokens,
            )
            try:
                completions: list[Completion] = await self.fleet.vlm.submit(request)
            except SampleFailed as error:
                log.warning("stage2 step %s: no anchor for a sample: %s", step, error)
                return Anchor("", None, 0.0, str(error))
            answer = parse_answer(completions[0].text)
            caption = answer.caption if answer else None
            anchor = Anchor(completions[0].text, caption, rouge_l(caption, sample.caption) if caption else 0.0)
            if greedy:
                self._anchors[sample.id] = anchor
        return anchor


def sde_window(config: RunConfig) -> WindowSchedule:
    """Return the schedule by which stage 2's SDE window moves."""
    sde = config.stage2.sde
    first, last = sde.window_range or (0, config.stage2.render.steps - 1)
    return WindowSchedule(
        kind=sde.window_schedule,
        first=first,
        last=last,
        size=sde.window_size,
        every=sde.window_every,
        seed=config.seed,
    )


def sde_spec(config: RunConfig, window: WindowSchedule, step: int) -> SdeSpec:
    """Return how the trajectories of ``step`` are sampled."""
    # Of the step, not of the number of updates so far: with staleness a batch is drawn before its turn.
    start, sde = window.start_at(step), config.stage2.sde
    return SdeSpec(schedule=sde.schedule, level=sde.level, window_start=start, window_size=sde.window_size)


def trajectory_experiences(batch: RolloutBatch, reference_frames: int) -> list[Experience]:
    """Return every trajectory of ``batch`` with its advantage, in a fixed order; a member without a clip has none."""
    items: list[Experience] = []
    for group, advantages in zip(batch.groups, batch.advantages, strict=True):
        reference = select_reference_frames(group.sample.context, reference_frames)
        for member, advantage in zip(group.members, advantages, strict=True):
            if member.clip is None:
                continue
            assert member.clip.trajectory is not None
            items.append(
                VdmExperience(
                    sample_id=group.sample.id,
                    index=member.index,
                    caption=member.caption,
                    reference_frames=reference,
                    trajectory=member.clip.trajectory,
                    advantage=float(advantage),
                    condition=member.clip.condition,
                )
            )
    return items
