"""Stage 2, context-faithful VDM adaptation (arXiv 2511.16669): the artist is trained against the frozen, tuned thinker.

The thinker writes an anchor caption; anchors that say something else than the ground truth (ROUGE-L below the threshold) are
dropped; for the others the artist samples G trajectories as an SDE.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from actors.policy.cache import content_key
from actors.pool.errors import SampleFailed
from actors.records import Completion, Experience, Sample, SdeSpec, VdmExperience, derive_seed
from actors.vdm.flow_sde import WindowSchedule, removable_steps
from cluster.errors import ConfigError, TrainingError
from pipeline.config import RunConfig
from pipeline.config.schema import VideoSection
from pipeline.fleet.open import Fleet
from pipeline.stages.feed import SampleFeed
from pipeline.stages.groups import Group, LeftOut, Member, RolloutBatch
from pipeline.stages.refill import draw_key
from pipeline.stages.requests import (
    artist_frames,
    collect,
    completion_request,
    judge_group,
    render,
    render_request,
    render_seeds,
    score,
    score_request,
    timed,
)
from rewards.errors import RewardError
from rewards.text import rouge_l


@dataclass(frozen=True)
class Anchor:
    """What the frozen thinker says about a sample, and how close that is to the truth."""

    text: str
    caption: str | None
    rouge_l: float
    failure: str = ""
    """Why there is none: the thinker could not be asked, or its caption could not be compared."""

    def refused(self, least: float) -> str:
        """Return why nothing is drawn of it, empty where it passes; ``least`` is stage2.anchor_min_rouge."""
        if self.failure:
            return self.failure
        if self.caption is None:
            return "its anchor answer holds no caption"
        if self.rouge_l < least:
            return f"its anchor caption has ROUGE-L {self.rouge_l:.3f} to the truth, below stage2.anchor_min_rouge={least:g}"
        return ""


@dataclass
class Stage2:
    """How stage 2 samples groups and what its learner reads."""

    config: RunConfig
    fleet: Fleet
    name = "stage2"
    title = "stage 2 · artist"
    policies: ClassVar[tuple[str, ...]] = ("vdm",)
    _greedy: dict[tuple[str, str, float, str], str] = field(
        default_factory=dict
    )  # the thinker's answer by the row that it was asked about
    _seen: dict[int, list[tuple[Sample, Anchor]]] = field(default_factory=dict)  # by step: several may be in flight
    _lost: dict[int, list[str]] = field(default_factory=dict)  # by step: why samples got no group

    def __post_init__(self) -> None:
        # An ODE has no window, and a grid of few steps may have no place for one.
        self.window = sde_window(self.config) if self.section.learning.samples == "steps" else None

    @property
    def section(self):
        """The stage's part of the configuration."""
        return self.config.stage2

    async def draw(self, feed: SampleFeed, step: int, count: int, wave: int = 0) -> list[asyncio.Task[Group | None]]:
        """Draw samples until ``count`` anchors pass the filter; each that passes starts rendering at once.

        A refill (``wave`` > 0) may come back with fewer, or none; the step's own samples may not.
        """
        tasks: list[asyncio.Task[Group | None]] = []
        key = draw_key(step, wave)
        seen = self._seen.setdefault(step, [])
        for _ in range(self.section.anchor_max_draws):
            samples = await feed.draw(count - len(tasks))
            for sample, anchor in zip(
                samples, await asyncio.gather(*(self.anchor(s, key) for s in samples)), strict=True
            ):
                seen.append((sample, anchor))
                if anchor.failure:
                    self._lost.setdefault(step, []).append(anchor.failure)
                if anchor.refused(self.section.anchor_min_rouge):
                    continue
                name = f"stage2 step {key} {sample.id}"
                spec = None if self.window is None else sde_spec(self.config, self.window, step, sample.id)
                tasks.append(asyncio.create_task(self.group(sample, anchor, key, spec), name=name))
            if len(tasks) == count:
                return tasks
        if tasks or wave:
            return tasks
        failures = [a.failure for _, a in seen if a.failure]
        if len(failures) == len(seen):
            raise TrainingError(f"stage2: there is no anchor caption for any of {len(seen)} samples: {failures[-1]}")
        failed = f"; {len(failures)} failed, the last: {failures[-1]}" if failures else ""
        raise TrainingError(
            f"stage2: no anchor caption out of {len(seen)} reached stage2.anchor_min_rouge={self.section.anchor_min_rouge}; "
            f"best {max((a.rouge_l for _, a in seen), default=0.0):.2f}. Train stage 1 longer or lower the threshold{failed}"
        )

    def lost(self, step: int) -> list[str]:
        """Return, once, why samples that were drawn for ``step`` got no group: as often as they would have trajectories."""
        return [reason for reason in self._lost.pop(step, []) for _ in range(self.section.rollout.group_size)]

    def passed_over(self, step: int) -> list[LeftOut]:
        """Return the samples that were drawn for ``step`` and got no group, until :meth:`metrics` has ended it: their anchors
        did not pass, or failed.
        """
        least = self.section.anchor_min_rouge
        return [
            LeftOut(Group(sample, (), text=anchor.text), refused, anchor.caption)
            for sample, anchor in self._seen.get(step, [])
            if (refused := anchor.refused(least))
        ]

    async def group(self, sample: Sample, anchor: Anchor, step: str, spec: SdeSpec | None) -> Group | None:
        """Sample, and score, G trajectories of the anchor caption: as an SDE, or without ``spec`` the ends of an ODE."""
        done = await asyncio.gather(
            *(self._member(sample, anchor, i, step, spec) for i in range(self.section.rollout.group_size)),
            return_exceptions=True,
        )
        return await judge_group(self.fleet, collect(sample, done, anchor.text), tuple(self.section.rewards.weights))

    async def _member(self, sample: Sample, anchor: Anchor, index: int, step: str, spec: SdeSpec | None) -> Member:
        assert anchor.caption is not None
        seed, ends = (self.config.seed, "stage2", step, sample.id), spec is None
        request = render_request(
            self.config,
            sample,
            anchor.caption,
            index,
            self.section.render,
            # Of one noise an ODE has one end: a group that differs by its ends needs a noise for each member.
            noise_seed=derive_seed(*seed, "noise", 0 if self.section.sde.same_latent and not ends else index),
            sde=spec,
            ends=ends,
            sde_seed=derive_seed(*seed, "sde", index),
        )
        clip, drawn = await timed(render(self.fleet, request))
        names = tuple(self.section.rewards.weights)
        asked = score_request(sample, index, names, anchor.text, anchor.caption, clip.frames)
        scores, scored = await timed(score(self.fleet, sample, asked))
        spans = {"render": drawn, "score": scored}
        return Member(index, anchor.caption, scores, None, clip, clip.weights_version, render_seeds(request), spans)

    def experiences(self, batch: RolloutBatch, policy: str) -> list[Experience]:
        """Return what the learner reads, in a fixed order."""
        return trajectory_experiences(batch, self.config.video)

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """Return what only stage 2 measures, over the anchors that ``step`` has drawn."""
        seen = [anchor for _, anchor in self._seen.pop(step, [])]
        kept = [not a.refused(self.section.anchor_min_rouge) for a in seen]
        metrics = {} if self.window is None else {"sde/window_start": mean_start(self.window, batch, step)}
        if seen:
            metrics |= {
                "anchor/kept": float(np.sum(kept)),
                "anchor/kept_ratio": float(np.mean(kept)),
                "anchor/failed": float(sum(bool(a.failure) for a in seen)),
                "anchor/rouge_l": float(np.mean([a.rouge_l for a in seen])),
            }
        return metrics

    async def anchor(self, sample: Sample, step: str) -> Anchor:
        """Return what is drawn of ``sample``: what the thinker says about it, or the truth; ``step`` seeds what is random in that."""
        if self.section.anchor == "truth" or self._keeps_truth(sample, step):
            return Anchor("", sample.caption, 1.0)
        return await self._ask(sample, step)

    def _keeps_truth(self, sample: Sample, step: str) -> bool:
        """Return whether ``sample`` is among the share of ``step`` whose true caption is drawn."""
        share = self.section.anchor_truth_share
        if not share:
            return False
        seed = derive_seed(self.config.seed, "stage2", step, sample.id, "truth")
        return bool(np.random.default_rng(seed).random() < share)

    async def _ask(self, sample: Sample, step: str) -> Anchor:
        greedy = self.section.text.temperature == 0
        asked = (sample.id, sample.question, sample.fps, content_key(sample.input_frames))
        text = self._greedy.get(asked) if greedy else None  # the thinker is frozen, so its greedy answer never changes
        if text is None:
            seed = derive_seed(self.config.seed, "stage2", step, sample.id, "anchor")
            try:
                request = completion_request(sample, self.section.text, seed)
                completions: list[Completion] = await self.fleet.vlm.submit(request)
            except SampleFailed as error:
                return Anchor("", None, 0.0, str(error))
            text = completions[0].text
            if greedy:
                self._greedy[asked] = text
        answer = self.config.models.prompt.answers.parse(text)
        caption = answer.caption if answer else None
        try:
            return Anchor(text, caption, rouge_l(caption, sample.caption) if caption else 0.0)
        except RewardError as error:
            return Anchor(text, None, 0.0, f"the anchor caption cannot be compared: {error}")


def sde_window(config: RunConfig) -> WindowSchedule:
    """Return the schedule by which stage 2's SDE window moves; ConfigError where no place is left for it."""
    sde = config.stage2.sde
    steps = window_steps(config)
    if sde.window_range is None and sde.window_size > len(steps):
        raise ConfigError(
            f"stage2.sde.window_size={sde.window_size} is longer than the {len(steps)} steps whose noise the steps after "
            f"them can remove ({_grid(config)}); shorten the window, lower stage2.sde.level or raise stage2.render.steps"
        )
    first, last = sde.window_range or (steps.start, steps.stop)
    return WindowSchedule(
        kind=sde.window_schedule,
        first=first,
        last=last,
        size=sde.window_size,
        every=sde.window_every,
        seed=config.seed,
        per=sde.window_per,
    )


def window_steps(config: RunConfig) -> range:
    """Return the steps of stage 2's grid whose noise the steps after them can remove: where the window moves by default."""
    section = config.stage2
    return removable_steps(
        section.render.steps, config.models.flow_shift, section.sde.schedule, section.sde.level, config.models.flow_grid
    )


def window_warnings(config: RunConfig) -> list[str]:
    """Return what to say before a run whose stage2.sde.window_range reaches steps whose noise stays in the clips.

    Raises ConfigError where no window has a place. Nothing is said of a run that samples no SDE.
    """
    if not (config.stage2.steps if config.training == "two_stage" else config.stage1.steps):
        return []
    if config.stage2.learning.samples == "ends":
        return []
    sde_window(config)
    given, steps = config.stage2.sde.window_range, window_steps(config)
    if given is None or not {*range(*given)} - {*steps}:
        return []
    fits = f"use [{steps.start}, {steps.stop}], or null for the same" if steps else "lower stage2.sde.level"
    return [
        f"stage2.sde.window_range=[{given[0]}, {given[1]}] reaches steps whose noise the steps after them cannot remove "
        f"({_grid(config)}): clips of such a window are grainy, and their rewards judge the grain; {fits}"
    ]


def _grid(config: RunConfig) -> str:
    section = config.stage2
    return (
        f"stage2.render.steps={section.render.steps}, models.flow_shift={config.models.flow_shift:g}, "
        f"schedule={section.sde.schedule}, level={section.sde.level:g}"
    )


def sde_spec(config: RunConfig, window: WindowSchedule, step: int, sample_id: str) -> SdeSpec:
    """Return how the trajectories of ``step`` about the sample are sampled: alike for its whole group."""
    # Of the step, not of the number of updates so far: with staleness a batch is drawn before its turn.
    start, sde = window.start_at(step, sample_id), config.stage2.sde
    return SdeSpec(sde.schedule, sde.level, start, sde.window_size, window.reach)


def mean_start(window: WindowSchedule, batch: RolloutBatch, step: int) -> float:
    """Return the first step of the window of ``step``, or the mean over the groups where each has its own."""
    if window.per == "batch":
        return float(window.start_at(step))
    starts = [window.start_at(step, group.sample.id) for group in batch.groups]
    return float(np.mean(starts)) if starts else 0.0


def trajectory_experiences(batch: RolloutBatch, video: VideoSection) -> list[Experience]:
    """Return every trajectory of ``batch`` with its advantage, in a fixed order; a member without a clip has none."""
    items: list[Experience] = []
    for group, advantages in zip(batch.groups, batch.advantages, strict=True):
        reference = artist_frames(video, group.sample)
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
