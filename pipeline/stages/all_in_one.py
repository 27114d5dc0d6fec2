"""Both models trained in one stage: the paper's ablation of the two-stage design (arXiv 2511.16669, "all-in-one").

A group is G completions of one question, each drawn once as an SDE trajectory; all rewards of both stages judge the pair of caption
and clip, and the same advantages train both models. A clip that fails may be the caption's fault or the artist's, and nothing
tells them apart: that is what the two stages are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from actors.records import Experience, RenderRequest, Sample, derive_seed
from pipeline.config.stages import RewardsSection, StageSection
from pipeline.stages.groups import RolloutBatch
from pipeline.stages.refill import step_of
from pipeline.stages.requests import render_request
from pipeline.stages.stage1 import Stage1, completion_experiences
from pipeline.stages.stage2 import mean_start, sde_spec, sde_window, trajectory_experiences


@dataclass
class AllInOne(Stage1):
    """Steps, rollout, text sampling, advantages and updates per batch are stage 1's, the SDE and its rendering stage 2's; the loss,
    the optimizer and the adapter of each model are its own stage's.
    """

    name = "all_in_one"
    title = "all-in-one · both"
    policies: ClassVar[tuple[str, ...]] = ("vlm", "vdm")

    def __post_init__(self) -> None:
        self.window = sde_window(self.config)

    @property
    def section(self) -> StageSection:
        """Stage 1's section with the rewards of both stages; where both weigh a component, stage 1's weight counts."""
        one, two = self.config.stage1, self.config.stage2
        rewards = RewardsSection(weights={**two.rewards.weights, **one.rewards.weights})
        # Every completion has a trajectory of its own, equal captions included.
        return one.model_copy(update={"rewards": rewards, "dedupe": False})

    def experiences(self, batch: RolloutBatch, policy: str) -> list[Experience]:
        """Return the completions for the VLM, or the trajectories for the VDM, with the same advantages."""
        if policy == "vlm":
            return completion_experiences(batch)
        return trajectory_experiences(batch, self.config.video)

    def metrics(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """Return what stage 1 measures, and where the window of ``step`` stands."""
        return {**super().metrics(batch, step), "sde/window_start": mean_start(self.window, batch, step)}

    def _render(self, sample: Sample, caption: str, index: int, step: str) -> RenderRequest:
        seed = (self.config.seed, self.name, step, sample.id)
        two = self.config.stage2
        return render_request(
            self.config,
            sample,
            caption,
            index,
            two.render,
            noise_seed=derive_seed(*seed, "noise", 0 if two.sde.same_latent else index),
            sde=sde_spec(self.config, self.window, step_of(step), sample.id),
            sde_seed=derive_seed(*seed, "sde", index),
        )
