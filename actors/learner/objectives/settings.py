"""Settings of the objectives, as a run's YAML holds them. No torch: the command line reads them.

Responsible for keys, defaults and ranges; the losses are in the modules of the objectives' names.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from actors.settings import Positive, Section, cite

StepBalance = Literal["none", "rectify", "ratio_norm"]


class ObjectiveSection(Section):
    """What every objective has: advantages, the reference, and how often a rollout batch is learnt from."""

    samples: ClassVar[Literal["steps", "ends"]] = "steps"
    """What a rollout hands on: tokens or stochastic steps with their log-probabilities, or final latents alone."""

    kl_beta: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL to the reference: the model without its adapter, or a frozen copy. 0 spares the "
        "reference pass.",
        json_schema_extra=cite("GRPO"),
    )
    std_norm: Literal["group", "batch", "none"] = Field(
        "group",
        description="Standard deviation that divides advantages: the group's, the whole batch's, or none.",
        json_schema_extra=cite("GRPO", "Flow-GRPO", "Dr.GRPO"),
    )
    normalise_rewards: bool = Field(
        False,
        description="Standardise each reward component within its group before the weighted sum, so that weights and "
        "not spreads decide.",
        json_schema_extra=cite("GDPO"),
    )
    gate_every: Positive = Field(
        10,
        description="Optimizer steps between two checks of the ratio gate, with old_logprobs=learner: a second pass over a "
        "batch that nothing has been learnt from yet must give the same log-probabilities. In between, a batch's first "
        "step takes them from its own training pass, which is a quarter less work with the same result. 1 checks always.",
    )
    updates_per_batch: Positive = Field(
        1,
        description="Optimizer steps into which a rollout batch is split, whole groups at a time.",
        json_schema_extra=cite("PPO", "GRPO"),
    )
    epochs_per_batch: Positive = Field(
        1,
        description="Times that the learner goes over a rollout batch; ratios stay relative to the policy before the "
        "first step.",
        json_schema_extra=cite("PPO"),
    )
    min_group: int = Field(2, ge=2, description="A group with fewer scored members is dropped.")
    kl_estimator: Literal["k1", "k2", "k3", "closed"] | None = Field(
        None,
        description="Estimate of the KL; null is the policy's own: k3 over tokens, the closed form over denoising steps.",
    )

    def samples_apart(self) -> bool:
        """Return whether other weights sample than those that are learnt and exported."""
        return False

    def forwards(self) -> float:
        """Return the passes without gradient that an experience gets for each that learns, the reference aside."""
        return 0.0


class GrpoSection(ObjectiveSection):
    """Group-relative policy optimisation (ALGORITHM.md: GRPO, common to both stages)."""

    clip_low: float = Field(
        0.2,
        gt=0,
        description="Lower clip range: ratios below 1 - clip_low have no gradient.",
        json_schema_extra=cite("PPO", "DAPO"),
    )
    clip_high: float = Field(
        0.2,
        gt=0,
        description="Upper clip range: ratios above 1 + clip_high have no gradient; above clip_low it is clip-higher.",
        json_schema_extra=cite("PPO", "DAPO"),
    )
    loss_norm: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="Mean over all tokens or steps of the batch (token, DAPO), mean of each trajectory's mean (sequence, "
        "GRPO), or sum divided by the longest possible trajectory (constant, Dr.GRPO).",
        json_schema_extra=cite("DAPO", "GRPO", "Dr.GRPO"),
    )
    old_logprobs: Literal["learner", "rollout"] = Field(
        "learner",
        description="Whose policy the samples count as: the learner's own, or the engine's, which weights each step by "
        "min(p_learner / p_engine, C), truncated importance sampling.",
        json_schema_extra=cite("PPO", "AReaL"),
    )
    importance_cap: float = Field(
        2.0,
        gt=0,
        description="Cap C of the importance weights, used with old_logprobs=rollout.",
        json_schema_extra=cite("IMPALA"),
    )

    def forwards(self) -> float:
        """Old log-probabilities: of a batch's first update for the ratio gate alone, of the others always."""
        steps = self.updates_per_batch * self.epochs_per_batch
        gate = min(1.0, steps / self.gate_every) if self.old_logprobs == "learner" else 0.0
        return (self.updates_per_batch - 1 + gate) / steps


class TokenGrpoSection(GrpoSection):
    """GRPO over the tokens of an answer."""

    rollout_correction: Literal["token_tis", "sequence_tis", "sequence_mask"] = Field(
        "token_tis",
        description="How old_logprobs=rollout weights a token, with r = p_learner / p_engine: min(r, C) of the token itself "
        "(token_tis), min(r, C) of the product over the answer (sequence_tis), or that product where it is at most C and 0 "
        "where it is above (sequence_mask). `learner/truncated_frac` is the share of tokens that the cap C touched.",
        json_schema_extra=cite("IMPALA", "AReaL"),
    )

    kl_estimator: Literal["k1", "k2", "k3"] = Field(  # type: ignore[assignment]
        "k3",
        description="Estimate of the KL per token, with D = ref - current: k1 = -D (with the gradient of k2, as its own "
        "is 0 in expectation), k2 = D^2/2 (the gradient of the KL), k3 = exp(D) - D - 1 (GRPO; the KL's gradient to "
        "first order).",
        json_schema_extra=cite("KL estimators", "KL as a loss"),
    )


class FlowGrpoSection(GrpoSection):
    """GRPO over the stochastic denoising steps of a flow."""

    clip_low: float = Field(
        1e-3,
        gt=0,
        description="Lower clip range; small, because a step's log-probability is a mean over all latent values.",
        json_schema_extra=cite("VANS", "Flow-GRPO"),
    )
    clip_high: float = Field(
        1e-3, gt=0, description="Upper clip range, as clip_low.", json_schema_extra=cite("VANS", "Flow-GRPO")
    )
    kl_beta: float = Field(
        0.004,
        ge=0,
        description="Weight of the KL to the reference: the model without its adapter, or a frozen copy. Paper: 0.004.",
        json_schema_extra=cite("VANS", "Flow-GRPO"),
    )
    loss_norm: Literal["token", "sequence", "constant"] = Field(
        "sequence",
        description="As in stage 1, over denoising steps; all trajectories have window_size of them, so the three agree.",
        json_schema_extra=cite("GRPO"),
    )
    kl_estimator: Literal["closed"] = Field(  # type: ignore[assignment]
        "closed",
        description="The KL of two Gaussian steps of equal std has a closed form; estimators would only add variance.",
        json_schema_extra=cite("Flow-GRPO"),
    )

    step_balance: StepBalance = Field(
        "none",
        description="How steps of different noise are made to learn alike (docs/objectives.md): not at all; by a weight of each step's "
        "surrogate (rectify); or by a ratio that is normalised over steps and a surrogate divided by the step's length in sigma "
        "(ratio_norm), which needs far smaller clip ranges and a schedule with an s(sigma). The KL is weighed by none.",
        json_schema_extra=cite("Flash-GRPO", "GRPO-Guard"),
    )

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _closed(cls, value: Any) -> Any:
        if value in ("k1", "k2", "k3"):
            raise ValueError(
                f"kl_estimator={value}: the flow's KL has a closed form and needs no estimator; leave the key out "
                "(k1, k2 and k3 are for stage1.grpo)"
            )
        return value


class GspoSection(TokenGrpoSection):
    """GSPO: one ratio for a whole answer, the geometric mean of its tokens' ratios, clipped as one."""

    clip_low: float = Field(
        3e-4,
        gt=0,
        description="Lower clip range; small, because the ratio is a mean over all tokens of the answer.",
        json_schema_extra=cite("GSPO"),
    )
    clip_high: float = Field(4e-4, gt=0, description="Upper clip range, as clip_low.", json_schema_extra=cite("GSPO"))
    loss_norm: Literal["token", "sequence", "constant"] = Field(
        "sequence",
        description="As for grpo; sequence gives each answer the same weight, which is GSPO's own.",
        json_schema_extra=cite("GSPO"),
    )


class CispoSection(TokenGrpoSection):
    """CISPO: a token's ratio is a weight without gradient, cut from above, and every token keeps its gradient."""

    clip_low: float = Field(
        1.0, gt=0, description="Lower cut: weights are at least 1 - clip_low. 1 does not cut, which is CISPO's own."
    )
    clip_high: float = Field(
        4.0, gt=0, description="Upper cut: weights are at most 1 + clip_high.", json_schema_extra=cite("CISPO")
    )


class ForwardSection(ObjectiveSection):
    """Forward-process objectives: clips are noised anew and the velocity is judged, so a rollout is a plain ODE."""

    samples: ClassVar[Literal["steps", "ends"]] = "ends"

    kl_beta: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared distance to the reference's velocity: the model without its adapter, or a frozen copy.",
        json_schema_extra=cite("DiffusionNFT"),
    )
    epochs_per_batch: Positive = Field(
        4,
        description="Times that the learner goes over a rollout batch, each with a new noise level and new noise for every clip.",
        json_schema_extra=cite("PPO", "DiffusionNFT"),
    )

    def forwards(self) -> float:
        """One by the weights that sampled."""
        return 1.0


class NftSection(ForwardSection):
    """DiffusionNFT: what scored well pulls the velocity, what scored badly pushes it (docs/objectives.md)."""

    beta: float = Field(
        0.5,
        gt=0,
        description="How far the two implicit velocities v_old + beta (v - v_old) and v_old - beta (v - v_old) reach.",
        json_schema_extra=cite("DiffusionNFT"),
    )
    advantage_max: float = Field(
        2.0,
        gt=0,
        description="Advantage at which a clip counts as wholly good, or, negative, as wholly bad.",
        json_schema_extra=cite("DiffusionNFT"),
    )
    behaviour_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The weights that sample follow those that learn: after each batch they keep this share of themselves. 0 takes "
        "the learnt weights as they are.",
        json_schema_extra=cite("DiffusionNFT"),
    )

    def samples_apart(self) -> bool:
        """Whether those that sample follow slowly."""
        return self.behaviour_decay > 0


class AwmSection(ForwardSection):
    """Advantage-weighted matching: a clipped ratio of flow-matching losses in the place of likelihoods (docs/objectives.md)."""

    clip_low: float = Field(
        0.2, gt=0, description="Lower clip range of the ratio.", json_schema_extra=cite("PPO", "AWM")
    )
    clip_high: float = Field(
        0.2, gt=0, description="Upper clip range of the ratio.", json_schema_extra=cite("PPO", "AWM")
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="Weight w of the loss in the ratio exp(w (loss_old - loss)). The loss is a mean over all latent values, so a "
        "likelihood's weight would be half their number.",
        json_schema_extra=cite("AWM"),
    )


class Learning(Section):
    """How a stage learns: the name of the objective, and a section of each one's settings under its name."""

    objective: str = Field("grpo", description="Way to learn.", json_schema_extra=cite("GRPO"))

    @property
    def learning(self) -> ObjectiveSection:
        """The settings of the objective that the stage learns by."""
        return self.ways()[self.objective]

    def ways(self) -> dict[str, ObjectiveSection]:
        """Return the settings of every objective that the stage may learn by, by its name."""
        sections = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: section for name, section in sections if isinstance(section, ObjectiveSection)}


class TokenLearning(Learning):
    """What stage 1 may learn by: tokens with their log-probabilities."""

    objective: Literal["grpo", "gspo", "cispo"] = Field(
        "grpo",
        description="Way to learn (docs/objectives.md); its settings stand in the section of its name, and the others are not read.",
        json_schema_extra=cite("GRPO", "GSPO", "CISPO"),
    )
    grpo: TokenGrpoSection = Field(default_factory=TokenGrpoSection)
    gspo: GspoSection = Field(default_factory=GspoSection)
    cispo: CispoSection = Field(default_factory=CispoSection)


class FlowLearning(Learning):
    """What stage 2 may learn by: denoising steps with their log-probabilities, or final latents."""

    objective: Literal["grpo", "nft", "awm"] = Field(
        "grpo",
        description="Way to learn (docs/objectives.md); its settings stand in the section of its name, and the others are not read.",
        json_schema_extra=cite("GRPO", "DiffusionNFT", "AWM"),
    )
    grpo: FlowGrpoSection = Field(default_factory=FlowGrpoSection)
    nft: NftSection = Field(default_factory=NftSection)
    awm: AwmSection = Field(default_factory=AwmSection)
