"""Sections of Joint-GRPO: the two stages and what they are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from actors.learner.objectives.settings import FlowLearning, Learning, TokenLearning
from actors.learner.settings import OptimSection
from actors.policy.settings import LoraSection
from actors.settings import FREE, Fraction, Positive, Section, cite
from actors.vdm.schedules import SCHEDULES
from actors.vdm.settings import SdeSection


class RolloutSection(Section):
    """How a batch of trajectories is sampled."""

    prompts_per_step: Positive = Field(8, description="Samples (groups) per optimizer batch.")
    group_size: int = Field(
        8, description="Trajectories per group, G. Paper: 8.", json_schema_extra=cite("GRPO", "VANS")
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="Steps by which rollout weights may lag; 0 is synchronous.",
        json_schema_extra=cite("AReaL"),
    )
    max_refills: int = Field(
        0,
        ge=0,
        description="Dynamic sampling: most groups that a step samples in addition, in place of those without a gradient "
        "(rewards all equal, or dropped). 0 is off; with it the rollouts of two steps do not overlap.",
        json_schema_extra=cite("DAPO"),
    )

    max_failed_ratio: Fraction = Field(
        0.1,
        description="Share of trajectories above which the run stops, if workers refuse their requests (a broken sample, a "
        "reward that raises or is not finite). Those refused leave their group and are logged.",
        json_schema_extra=FREE,
    )

    @model_validator(mode="after")
    def _group(self) -> RolloutSection:
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: a group-relative advantage needs at least 2 trajectories (paper: 8)"
            )
        return self


class RenderSection(Section):
    """How the VDM samples."""

    steps: Positive = Field(10, description="Denoising steps. Training 10-20, evaluation 40-50 on Wan2.1.")
    guidance: float = Field(
        1.0,
        ge=1.0,
        description="Classifier-free guidance scale; 1 is off. In stage 2 the guided velocity is the policy: sampler and "
        "learner compute it alike, and the gradient goes through both of its branches.",
        json_schema_extra=cite("classifier-free guidance", "Flow-GRPO"),
    )


class TextSamplingSection(Section):
    """How the VLM samples. What is learnt from is sampled without top-p: the learner's log-probabilities are those of the whole
    vocabulary.
    """

    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus: the likeliest tokens that hold this share of probability are sampled from; 1 is all. Stage 1 learns from "
        "its answers and takes 1 alone.",
        json_schema_extra=cite("nucleus sampling"),
    )
    max_tokens: Positive = Field(48, description="Longest completion in tokens.")


class GreedyTextSection(TextSamplingSection):
    """How the VLM answers held-out questions."""

    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")


class RewardsSection(Section):
    """Component name → weight. A name is built in, one of models.rewards, or a dotted path, ``module:function`` or ``module:Class``
    (docs/rewards.md).
    """

    weights: dict[str, float] = Field(
        default_factory=dict, description="Weights of the components in the total.", json_schema_extra=cite("VANS")
    )


class StageSection(Learning):
    """What both stages have in common."""

    steps: int = Field(100, ge=0, description="Rollout batches to train on; 0 skips the stage.")
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    text: TextSamplingSection = Field(default_factory=TextSamplingSection)
    render: RenderSection = Field(default_factory=RenderSection)
    rewards: RewardsSection = Field(default_factory=RewardsSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    lora: LoraSection = Field(default_factory=LoraSection)

    @model_validator(mode="after")
    def _min_group(self) -> StageSection:
        if self.learning.min_group > self.rollout.group_size:
            raise ValueError(
                f"{self.objective}.min_group={self.learning.min_group} drops every group of rollout.group_size="
                f"{self.rollout.group_size}; lower it"
            )
        return self


class Stage1Section(TokenLearning, StageSection):
    """Visualization-friendly VLM tuning (paper, stage 1)."""

    rewards: RewardsSection = Field(RewardsSection(weights={"format": 1.0, "rouge_l": 1.0, "clip_v": 1.0}))
    dedupe: bool = Field(True, description="Render equal captions of a group once.")

    @model_validator(mode="after")
    def _whole_vocabulary(self) -> Stage1Section:
        if self.steps and self.text.top_p < 1:
            raise ValueError(
                f"text.top_p={self.text.top_p:g}: stage 1 learns from these answers, and the learner's log-probabilities are those of "
                "the whole vocabulary: the ratio of each token would be off by the share that the nucleus leaves out; set top_p: 1 "
                "here (evaluate.text.top_p and stage2.text.top_p are free)"
            )
        return self

    @model_validator(mode="after")
    def _temperature(self) -> Stage1Section:
        if self.steps and self.text.temperature == 0:
            raise ValueError(
                "text.temperature=0 is greedy: all members of a group would be equal and nothing could be learnt; "
                "use e.g. 1.0"
            )
        return self


class Stage2Section(FlowLearning, StageSection):
    """Context-faithful VDM adaptation (paper, stage 2)."""

    rewards: RewardsSection = Field(RewardsSection(weights={"clip_v": 1.0, "clip_score": 1.0}))
    sde: SdeSection = Field(default_factory=SdeSection)
    anchor_min_rouge: Fraction = Field(
        0.6,
        description="Anchor captions with a lower ROUGE-L to ground truth are dropped. Paper: 0.6.",
        json_schema_extra=cite("VANS"),
    )
    anchor: Literal["thinker", "truth"] = Field(
        "thinker",
        description="Whose caption is drawn: the frozen thinker's anchor (paper), or the true one (GRPO of the VDM alone).",
    )
    anchor_truth_share: Fraction = Field(
        0.0,
        description="Share of the samples, drawn anew at each step, whose true caption is drawn in place of the thinker's anchor: "
        "so that the artist keeps to captions that are not this thinker's.",
        json_schema_extra=cite("PromptRL"),
    )
    anchor_max_draws: Positive = Field(8, description="Batches drawn in search of enough anchors before the run stops.")

    @model_validator(mode="after")
    def _share(self) -> Stage2Section:
        if self.anchor == "truth" and self.anchor_truth_share:
            raise ValueError(
                f"anchor=truth with anchor_truth_share={self.anchor_truth_share:g}: true captions are drawn for all samples; leave the "
                "share at 0, or set anchor: thinker"
            )
        return self

    @model_validator(mode="after")
    def _ends(self) -> Stage2Section:
        if self.steps and self.learning.samples == "ends" and self.rollout.max_staleness:
            raise ValueError(
                f"objective={self.objective} with rollout.max_staleness={self.rollout.max_staleness}: it compares the learner with "
                "the weights that sampled, of which it keeps the newest alone; set max_staleness: 0"
            )
        return self

    @model_validator(mode="after")
    def _window(self) -> Stage2Section:
        if self.learning.samples == "ends":
            return self
        if self.sde.level == 0:
            ends = [name for name, section in self.ways().items() if section.samples == "ends"]
            raise ValueError(
                f"objective={self.objective} with sde.level=0: it learns from stochastic steps with their log-probabilities, and at "
                f"level 0 the rollout is an ODE, which has none; use a level above 0, such as 0.7, or objective: {' or '.join(ends)}"
            )
        if self.grpo.step_balance == "ratio_norm" and SCHEDULES[self.sde.schedule].scale is None:
            with_scale = ", ".join(name for name, row in SCHEDULES.items() if row.scale is not None)
            raise ValueError(
                f"grpo.step_balance=ratio_norm with sde.schedule={self.sde.schedule}: the normalised ratio is that of an SDE with an "
                f"s(sigma), which this schedule has not; use step_balance: rectify, or one of the schedules {with_scale}"
            )
        first, last = self.sde.window_range or (0, self.render.steps - 1)
        if last <= first and self.sde.window_range:
            raise ValueError(
                f"sde.window_range=({first}, {last}) holds no step: it is [first, last), so last must exceed first"
            )
        if last > self.render.steps - 1 or first < 0:
            raise ValueError(
                f"sde.window_range=({first}, {last}) leaves the schedule: with render.steps={self.render.steps} the stochastic steps "
                f"are 0…{self.render.steps - 2}, because the last step is always an ODE step"
            )
        if self.sde.window_size > last - first:
            raise ValueError(
                f"sde.window_size={self.sde.window_size} is longer than the {last - first} steps it may move in; "
                f"shorten the window or raise render.steps (now {self.render.steps})"
            )
        return self
