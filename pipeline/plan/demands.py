"""What a step of each stage asks of each role, in GPU-seconds: from FLOPs and bytes over assumed rates, or as a run measured it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from actors.architectures import cost as costs
from actors.scoring.components import TEXT_ONLY
from cluster.hardware import Rates
from pipeline.config import RunConfig
from pipeline.config.stages import RenderSection, RolloutSection, StageSection
from pipeline.fleet.rewards import reward_models
from pipeline.plan.balance import Demand, StageDemand
from pipeline.plan.measured import Measured
from pipeline.plan.memory import completions_of_a_row
from pipeline.plan.models import BYTES, Models, score_of
from pipeline.plan.work import CAPTION_TOKENS, branches, experience_flops, frames_flops, trajectory_forward

PUBLISH_BANDWIDTH = 10e9
"""Assumed bytes per second of whole models on their way to the pools; an adapter takes no time."""


def stage_demands(
    config: RunConfig, models: Models, rates: Rates, measured: Measured | None = None
) -> tuple[StageDemand, ...]:
    """Return the stages of ``config`` that have steps. Every group is taken at its worst: all captions differ and are well-formed,
    completions reach ``max_tokens``, and all anchors pass.
    """
    count = _Count(config, models, rates)
    one, two = config.stage1, config.stage2
    stages: list[tuple[str, StageSection, list[Demand]]] = []
    if config.training == "all_in_one":
        learn = [replace(count.learn_vlm(), name="learn vlm"), replace(count.learn_vdm(one.rollout), name="learn vdm")]
        draws = count.draws(one.rollout, two.render, one.rollout.group_size)
        stages.append(("all_in_one", one, [count.think(), *draws, count.score(one), *learn]))
    else:
        text_only = TEXT_ONLY.issuperset(one.rewards.weights)
        draws = [] if text_only else count.draws(one.rollout, one.render, one.rollout.group_size)
        stages.append(("stage1", one, [count.think(), *draws, count.score(one), count.learn_vlm()]))
        anchor = [] if two.anchor == "truth" else [count.anchor()]
        draws = count.draws(two.rollout, two.render, 1)
        stages.append(("stage2", two, [*anchor, *draws, count.score(two), count.learn_vdm(two.rollout)]))
    found = []
    for name, section, demands in stages:
        if not section.steps:
            continue
        also = two.rewards.weights if name == "all_in_one" else {}
        demands[-1:-1] = count.judge(section.rollout, {*section.rewards.weights, *also})
        publish = count.publish(name)
        if publish is not None:
            demands.append(publish)
        if measured is not None:
            demands = [as_measured(demand, name, section.rollout.prompts_per_step, measured) for demand in demands]
        ahead = section.rollout.max_staleness > 0 and not section.rollout.max_refills
        found.append(StageDemand(name, section.steps, tuple(demands), ahead))
    return tuple(found)


def as_measured(demand: Demand, stage: str, prompts: int, measured: Measured) -> Demand:
    """Return ``demand`` with the seconds, and the requests per prompt, that the run took; as it is where none were recorded."""
    key = (stage, demand.name)
    if key not in measured.unit_s:
        return demand
    took = measured.unit_s[key]
    if demand.name == "publish":
        return replace(demand, fixed_s=took, source="measured")
    units = measured.per_step[key] * prompts if key in measured.per_step else demand.units
    return replace(demand, units=units, unit_s=took, fixed_s=0.0, source="measured")


class _Count:
    """The demands, one by one."""

    def __init__(self, config: RunConfig, models: Models, rates: Rates) -> None:
        self.config, self.models, self.rates = config, models, rates

    def think(self) -> Demand:
        """All completions of a step: a request is a group."""
        rollout, text = self.config.stage1.rollout, self.config.stage1.text
        return self._generate("think", rollout.prompts_per_step, rollout.group_size, text.max_tokens)

    def anchor(self) -> Demand:
        """One caption for each group of stage 2."""
        two = self.config.stage2
        return self._generate("anchor", two.rollout.prompts_per_step, 1, two.text.max_tokens)

    def _generate(self, name: str, requests: int, completions: int, tokens: int) -> Demand:
        pool, models = self.config.pools.vlm, self.models
        element, engine = BYTES[pool.dtype], pool.tensor_parallel
        flops = costs.generate_flops(models.vlm, models.prompt, tokens, completions).total
        # Each new token reads all weights once for all sequences, and the keys and values of its own sequence.
        read = costs.kv_cache_bytes(models.vlm, models.prompt.prompt + tokens, element) * tokens * completions
        weights = models.parameters["vlm", "model"] * element * tokens
        return Demand(
            name,
            "vlm",
            units=requests,
            unit_s=(flops / self.rates.flops(pool.dtype) + read / self.rates.bandwidth) / engine,
            fixed_s=weights / self.rates.bandwidth / engine,
            source="FLOPs and bytes",
        )

    def draws(self, rollout: RolloutSection, render: RenderSection, captions: int) -> list[Demand]:
        """All clips of a step, whose groups have ``captions`` captions each. An embed pool, if there is one, embeds and encodes."""
        models, pools = self.models, self.config.pools
        shapes = models.vdm.shapes
        sampling = shapes.transformer_flops(models.clip_tokens).total * render.steps * branches(render.guidance)
        decoding, encoding = frames_flops(self.config, shapes)
        # The processes of a sampler share a clip's tokens; the first decodes.
        sharers = pools.vdm.context_parallel
        seconds = sampling / self.rates.flops(pools.vdm.dtype) / sharers + decoding / self.rates.tf32
        clips, embedder = (
            rollout.prompts_per_step * rollout.group_size,
            pools.embed if pools.embed.workers else pools.vdm,
        )
        caption = shapes.text_encoder_flops(CAPTION_TOKENS).total / self.rates.flops(embedder.dtype)
        group = captions * caption + encoding / self.rates.tf32
        if not pools.embed.workers:
            return [Demand("draw", "vdm", clips, seconds + group / rollout.group_size, source="FLOPs")]
        embed = Demand("embed", "embed", rollout.prompts_per_step, group, source="FLOPs")
        return [embed, Demand("draw", "vdm", clips, seconds, source="FLOPs")]

    def score(self, section: StageSection) -> Demand:
        """All answers of a step: a request is an answer. The target's frames are read once for each group."""
        rollout, frames = section.rollout, self.config.video.num_frames
        image, text = costs.clip_image_flops(self.models.clip).total, costs.clip_text_flops(self.models.clip).total
        flops = image * frames * (1 + 1 / rollout.group_size) + text
        return Demand(
            "score",
            "reward",
            rollout.prompts_per_step * rollout.group_size,
            0.0 if TEXT_ONLY.issuperset(section.rewards.weights) else flops / self.rates.float32,
            source="FLOPs",
        )

    def judge(self, rollout: RolloutSection, weighted: Collection[str]) -> list[Demand]:
        """Return all answers of a step for each reward with a model that is weighted; how long one takes only a run can say."""
        return [
            Demand(score_of(pool), pool, rollout.prompts_per_step * rollout.group_size, 0.0, source="not known")
            for pool, (component, _) in reward_models(self.config).items()
            if component in weighted
        ]

    def learn_vlm(self) -> Demand:
        """All completions of a step, once for each epoch; those of a group in one micro-batch read their prompt together."""
        models, stage = self.models, self.config.stage1
        forward = costs.completion_flops(
            models.vlm, models.prompt, stage.text.max_tokens, completions_of_a_row(self.config)
        )
        return self._learn("vlm", forward, stage.rollout)

    def learn_vdm(self, rollout: RolloutSection) -> Demand:
        """All trajectories of a step."""
        forward = trajectory_forward(self.config, self.models.vdm.shapes, self.models.clip_tokens)
        return self._learn("vdm", forward, rollout)

    def _learn(self, policy: Literal["vlm", "vdm"], forward: costs.Flops, rollout: RolloutSection) -> Demand:
        seconds = experience_flops(self.config, policy, forward) / self.rates.flops(self.config.learner.dtype)
        return Demand("learn", "learner", rollout.prompts_per_step * rollout.group_size, seconds, source="FLOPs")

    def publish(self, stage: str) -> Demand | None:
        """Whole models on their way to the pools; None where adapters are."""
        trained = {"stage1": ("vlm",), "stage2": ("vdm",), "all_in_one": ("vlm", "vdm")}[stage]
        whole = 0.0
        for policy in trained:
            section = self.config.stage1 if policy == "vlm" else self.config.stage2
            component = "model" if policy == "vlm" else "transformer"
            whole += 0.0 if section.lora.rank else 4.0 * self.models.parameters[policy, component]
        return Demand("publish", "learner", 1, 0.0, whole / PUBLISH_BANDWIDTH, source="bytes") if whole else None
