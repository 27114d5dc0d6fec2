"""What a user may write in a run's YAML: pydantic models, unknown keys rejected, every key with a sentence.

This module holds types, defaults and contradictions only; reading files and overrides is ``pipeline.config.load``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rewards.alarms import AlarmSettings

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


PAPERS = {
    "VANS": "arXiv:2511.16669",
    "GRPO": "arXiv:2402.03300",
    "DAPO": "arXiv:2503.14476",
    "Dr.GRPO": "arXiv:2503.20783",
    "GDPO": "arXiv:2601.05242",
    "PPO": "arXiv:1707.06347",
    "IMPALA": "arXiv:1802.01561",
    "AReaL": "arXiv:2505.24298",
    "Flow-GRPO": "arXiv:2505.05470",
    "DanceGRPO": "arXiv:2505.07818",
    "MixGRPO": "arXiv:2507.21802",
    "CPS": "arXiv:2509.05952",
    "DiffusionNFT": "arXiv:2509.16117",
    "classifier-free guidance": "arXiv:2207.12598",
    "rectified flow": "arXiv:2403.03206",
    "LoRA": "arXiv:2106.09685",
    "AdamW": "arXiv:1711.05101",
    "cosine": "arXiv:1608.03983",
    "warm-up": "arXiv:1706.02677",
    "KL estimators": "Schulman 2020, Approximating KL divergence",
    "KL as a loss": "arXiv:2510.01555",
}


def cite(*papers: str) -> dict[str, Any]:
    """Return the ``json_schema_extra`` of a key that does what ``papers`` (names in PAPERS) introduced."""
    return {"source": "; ".join(f"{name} ({PAPERS[name]})" for name in papers)}


class Section(BaseModel):
    """A part of the configuration; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelsSection(Section):
    """Where the models come from: a local folder, ``tiny`` for the pair in this repository, or a hub name."""

    vlm: str = Field("tiny", description="Vision-language model: transformers folder or hub name.")
    vdm: str = Field("tiny", description="Video diffusion model: diffusers WanPipeline folder or hub name.")
    clip: str = Field("tiny", description="CLIP model that scores: transformers folder or hub name.")
    vlm_adapter: str | None = Field(None, description="PEFT adapter folder the VLM starts from.")
    vdm_adapter: str | None = Field(None, description="PEFT adapter folder the VDM starts from.")
    flow_shift: float = Field(
        3.0,
        gt=0,
        description="Shift of the artist's flow-matching sigma grid, as in its SFT.",
        json_schema_extra=cite("rectified flow"),
    )


class VideoSection(Section):
    """Shape of the clips. Paper: n=6 reference frames, 33 frames of 352x640."""

    num_frames: Positive = Field(9, description="Frames of a rendered clip, 4k+1 for Wan's causal VAE.")
    height: Positive = Field(32, description="Height of rendered and target frames in pixels.")
    width: Positive = Field(32, description="Width of rendered and target frames in pixels.")
    fps: float = Field(8.0, gt=0, description="Frames per second written to mp4 answers.")
    input_frames: Positive = Field(9, description="Frames of the input video that the VLM sees, sampled uniformly.")
    vlm_height: Positive = Field(32, description="Height of the frames that the VLM sees.")
    vlm_width: Positive = Field(32, description="Width of the frames that the VLM sees.")
    reference_frames: Positive = Field(
        2, description="Reference frames that condition the VDM (n), last input frame included."
    )

    @model_validator(mode="after")
    def _causal_vae(self) -> VideoSection:
        if self.num_frames % 4 != 1:
            down, up = self.num_frames - (self.num_frames - 1) % 4, self.num_frames + 3 - (self.num_frames - 2) % 4
            raise ValueError(
                f"num_frames={self.num_frames} must be 4k+1 (Wan's VAE drops frames silently), e.g. {down} or {up}"
            )
        return self


class DataSection(Section):
    """Parquet shards of VNEP samples (see docs/data.md for the columns)."""

    train: Path = Field(Path("data/toy/train"), description="Folder of Parquet shards to train on.")
    eval: Path = Field(Path("data/toy/test"), description="Folder of Parquet shards to evaluate on; never trained on.")
    seed: int = Field(0, description="Seed of the sample order; the order is a pure function of (seed, epoch).")
    max_quarantine_ratio: Fraction = Field(0.05, description="Share of undecodable rows above which the run stops.")
    decoders: Positive = Field(1, description="Ray Data workers that decode video.")
    max_pixels: Positive = Field(3840 * 2160, description="Largest frame accepted, in pixels.")
    max_source_frames: Positive = Field(20000, description="Most frames read from one source video.")


class LoraSection(Section):
    """Low-rank adapter of the trained model; ``rank: 0`` trains all weights. Paper: r=8, alpha=32."""

    rank: int = Field(
        8,
        ge=0,
        description="LoRA rank; 0 trains the full weights, and the run exports a whole model (vlm_model, vdm_model) instead of "
        "an adapter (vlm_adapter, vdm_adapter).",
        json_schema_extra=cite("LoRA", "VANS"),
    )
    alpha: float = Field(
        32.0, gt=0, description="LoRA alpha; the scaling is alpha/rank.", json_schema_extra=cite("LoRA", "VANS")
    )
    targets: list[str] | None = Field(None, description="Module name suffixes; default: attention and MLP projections.")


class OptimSection(Section):
    """AdamW and what surrounds it."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate. Paper: 5e-5.", json_schema_extra=cite("VANS"))
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas.", json_schema_extra=cite("AdamW"))
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.", json_schema_extra=cite("AdamW"))
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps over which the rate climbs linearly to lr; 0 starts there.",
        json_schema_extra=cite("warm-up"),
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="Rate after warm-up: lr throughout, or a cosine or linear descent to 0 at the stage's last planned step.",
        json_schema_extra=cite("cosine"),
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping by global norm.")
    max_skipped_steps: int = Field(
        5, ge=0, description="Non-finite gradients skip a step; more than this stop the run."
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per optimizer step of a moving average of the trained weights; it is what is exported and "
        "evaluated, while rollouts use the weights themselves. 0 keeps none.",
        json_schema_extra=cite("Flow-GRPO", "DiffusionNFT"),
    )


class SftOptimSection(OptimSection):
    """AdamW and what surrounds it, in supervised fine-tuning."""

    lr: float = Field(5e-5, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(
        10,
        ge=0,
        description="Optimizer steps over which the rate climbs linearly to lr; 0 starts there.",
        json_schema_extra=cite("warm-up"),
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine",
        description="Rate after warm-up: lr throughout, or a cosine or linear descent to 0 at the last step; max_wall_s "
        "needs constant.",
        json_schema_extra=cite("cosine"),
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per optimizer step of a moving average of the trained weights, which is what is exported; 0 "
        "exports the weights themselves.",
    )


class SftLoraSection(LoraSection):
    """Low-rank adapter that supervised fine-tuning trains; ``rank: 0`` trains all weights."""

    rank: int = Field(0, ge=0, description="LoRA rank; 0 trains the full weights.", json_schema_extra=cite("LoRA"))
    alpha: float = Field(
        32.0, gt=0, description="LoRA alpha; the scaling is alpha/rank.", json_schema_extra=cite("LoRA")
    )


class SftModelSection(Section):
    """Supervised fine-tuning of one model by ``vans sft``: one of steps, epochs and max_wall_s says how long.

    Ranks, GPUs, dtype and activation checkpointing are ``learner``'s, shapes ``video``'s, decoding ``data``'s.
    """

    data: Path | None = Field(None, description="Folder of Parquet shards to train on; null is data.train.")
    out: Path | None = Field(
        None, description="Folder that becomes the tuned model or adapter; null is sft-vlm or sft-vdm in the run's out."
    )
    steps: Positive | None = Field(None, description="Optimizer steps.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="Passes over the data.")
    max_wall_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds of training, all starts of the run together."
    )
    batch: Positive = Field(64, description="Samples per optimizer step, over all ranks; a multiple of learner.ranks.")
    micro_batch: Positive | None = Field(
        None, description="Samples per forward and backward on one rank; null is all of the rank's share."
    )
    optim: SftOptimSection = Field(default_factory=SftOptimSection)
    lora: SftLoraSection = Field(default_factory=SftLoraSection)
    checkpoint_every: int = Field(
        500, ge=0, description="Steps between checkpoints, the last one being kept; 0 writes one at the end only."
    )
    max_failures: int = Field(0, ge=0, description="Times that failed ranks start again from the last checkpoint.")
    log_every: Positive = Field(10, description="Steps between lines of figures.")
    cache_mib: Positive = Field(
        2048,
        description="Memory of a rank for decoded samples; a larger share of the data is decoded anew in each epoch.",
    )

    @model_validator(mode="after")
    def _length(self) -> SftModelSection:
        limits = {name: getattr(self, name) for name in ("steps", "epochs", "max_wall_s")}
        given = [f"{name}={value:g}" for name, value in limits.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)}: give one of steps, epochs and max_wall_s, and null for the others"
            )
        if self.max_wall_s is not None and self.optim.schedule != "constant":
            raise ValueError(
                f"max_wall_s={self.max_wall_s:g} needs optim.schedule=constant, since nobody knows where "
                f"{self.optim.schedule} ends"
            )
        return self


class SftVdmSection(SftModelSection):
    """Supervised fine-tuning of the VDM by ``vans sft``, as of the VLM."""

    train_text_encoder: bool = Field(False, description="Train the text encoder too, with all of its weights.")

    @model_validator(mode="after")
    def _whole_encoder(self) -> SftVdmSection:
        if self.train_text_encoder and self.lora.rank:
            raise ValueError(f"train_text_encoder trains all weights and cannot go with lora.rank={self.lora.rank}")
        return self


class SftSection(Section):
    """Supervised fine-tuning of either model, before Joint-GRPO."""

    vlm: SftModelSection = Field(default_factory=SftModelSection)
    vdm: SftVdmSection = Field(default_factory=SftVdmSection)


class GrpoSection(Section):
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


class TokenGrpoSection(GrpoSection):
    """GRPO over the tokens of an answer."""

    kl_estimator: Literal["k1", "k2", "k3"] = Field(
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
    kl_estimator: Literal["closed"] = Field(
        "closed",
        description="The KL of two Gaussian steps of equal std has a closed form; estimators would only add variance.",
        json_schema_extra=cite("Flow-GRPO"),
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
    """How the VLM samples. Without top-p or top-k: the learner's log-probabilities are those of the whole vocabulary."""

    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    max_tokens: Positive = Field(48, description="Longest completion in tokens.")


class GreedyTextSection(TextSamplingSection):
    """How the VLM answers held-out questions."""

    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy.")


class RewardsSection(Section):
    """Component name → weight. A name is built in (see docs/rewards.md) or a dotted path ``module:function``."""

    weights: dict[str, float] = Field(
        default_factory=dict, description="Weights of the components in the total.", json_schema_extra=cite("VANS")
    )


class SdeSection(Section):
    """Stochastic sampling of the flow (Flow-GRPO, DanceGRPO, MixGRPO window)."""

    schedule: Literal["flow", "wan", "dance", "cps"] = Field(
        "flow",
        description="Noise schedule s(sigma): flow a*sqrt(sigma/(1-sigma)), wan linear from 0 at the data, dance "
        "constant, cps coefficients-preserving.",
        json_schema_extra=cite("Flow-GRPO", "DanceGRPO", "CPS"),
    )
    level: float = Field(
        0.7,
        gt=0,
        description="Noise level: a (flow; cps, at most 1), eta (dance, 0.25-0.3) or sigma_max (wan).",
        json_schema_extra=cite("Flow-GRPO", "DanceGRPO", "CPS"),
    )
    window_size: Positive = Field(
        2,
        description="Stochastic, trained steps per trajectory; the other steps follow the ODE.",
        json_schema_extra=cite("MixGRPO"),
    )
    window_range: tuple[int, int] | None = Field(
        None,
        description="Steps [first, last) within which the window moves; default: all but the last.",
        json_schema_extra=cite("MixGRPO"),
    )
    window_schedule: Literal["fixed", "progressive", "random"] = Field(
        "random",
        description="How the window moves: not at all, towards the data and over again, or by chance (seeded).",
        json_schema_extra=cite("MixGRPO"),
    )
    window_every: Positive = Field(
        1, description="Steps (rollout batches) between moves of the window.", json_schema_extra=cite("MixGRPO")
    )
    same_latent: bool = Field(
        True, description="All members of a group start from the same noise.", json_schema_extra=cite("DanceGRPO")
    )

    @model_validator(mode="after")
    def _level(self) -> SdeSection:
        if self.schedule == "cps" and self.level > 1:
            raise ValueError(f"level={self.level}: with schedule=cps the angle is level*pi/2, so level is at most 1")
        return self


class StageSection(Section):
    """What both stages have in common."""

    steps: int = Field(100, ge=0, description="Rollout batches to train on; 0 skips the stage.")
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    text: TextSamplingSection = Field(default_factory=TextSamplingSection)
    render: RenderSection = Field(default_factory=RenderSection)
    rewards: RewardsSection = Field(default_factory=RewardsSection)
    grpo: GrpoSection = Field(default_factory=GrpoSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    lora: LoraSection = Field(default_factory=LoraSection)

    @model_validator(mode="after")
    def _min_group(self) -> StageSection:
        if self.grpo.min_group > self.rollout.group_size:
            raise ValueError(
                f"grpo.min_group={self.grpo.min_group} drops every group of rollout.group_size="
                f"{self.rollout.group_size}; lower it"
            )
        return self


class Stage1Section(StageSection):
    """Visualization-friendly VLM tuning (paper, stage 1)."""

    rewards: RewardsSection = Field(RewardsSection(weights={"format": 1.0, "rouge_l": 1.0, "clip_v": 1.0}))
    grpo: TokenGrpoSection = Field(default_factory=TokenGrpoSection)
    dedupe: bool = Field(True, description="Render equal captions of a group once.")

    @model_validator(mode="after")
    def _temperature(self) -> Stage1Section:
        if self.steps and self.text.temperature == 0:
            raise ValueError(
                "text.temperature=0 is greedy: all members of a group would be equal and nothing could be learnt; "
                "use e.g. 1.0"
            )
        return self


class Stage2Section(StageSection):
    """Context-faithful VDM adaptation (paper, stage 2)."""

    rewards: RewardsSection = Field(RewardsSection(weights={"clip_v": 1.0, "clip_score": 1.0}))
    grpo: FlowGrpoSection = Field(default_factory=FlowGrpoSection)
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
    anchor_max_draws: Positive = Field(8, description="Batches drawn in search of enough anchors before the run stops.")

    @model_validator(mode="after")
    def _window(self) -> Stage2Section:
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


class PoolSection(Section):
    """One elastic pool of workers."""

    workers: Positive = Field(1, description="Workers to start.")
    cpus: float = Field(0.5, ge=0, description="CPU cores reserved per worker.")
    gpus: float = Field(0.0, ge=0, description="GPUs reserved per worker; a fraction shares one.")
    resources: dict[str, float] = Field(default_factory=dict, description="Custom Ray resources per worker.")
    max_batch: Positive = Field(16, description="Most requests in one call of a worker.")
    max_inflight: Positive = Field(1, description="Calls a worker may have at once.")
    max_wait_s: float = Field(0.02, ge=0, description="Longest a request waits for its batch to fill.")
    start_timeout_s: float = Field(300.0, gt=0, description="Deadline for a worker to load its model.")
    request_timeout_s: float = Field(300.0, gt=0, description="Deadline for one call.")
    max_retries: int = Field(3, ge=0, description="Times a request is sent again after an infrastructure failure.")
    max_restarts: int = Field(20, ge=0, description="Restarts of the pool's workers before the run stops.")


class VlmPoolSection(PoolSection):
    """vLLM engines."""

    max_batch: Positive = Field(1, description="Most requests in one call of a worker; vLLM batches by itself.")
    max_inflight: Positive = Field(64, description="Requests inside one engine at once.")
    max_model_len: Positive = Field(512, description="vLLM's context length in tokens.")
    kv_cache_mib: Positive | None = Field(256, description="KV cache per engine in MiB; null lets vLLM decide (GPU).")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Engine dtype.")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="vLLM's share of the GPU's memory.")
    tensor_parallel: Positive = Field(1, description="GPUs per engine.")
    enforce_eager: bool = Field(True, description="Skip graph capture; false is faster on GPUs after a slower start.")


class VdmPoolSection(PoolSection):
    """Diffusion sampling workers."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of the transformer; latents stay float32."
    )


class PoolsSection(Section):
    """The three pools, sized independently."""

    vlm: VlmPoolSection = Field(default_factory=VlmPoolSection)
    vdm: VdmPoolSection = Field(default_factory=VdmPoolSection)
    reward: PoolSection = Field(default_factory=PoolSection)


class LearnerSection(Section):
    """One learner group: FSDP2 ranks."""

    ranks: Positive = Field(2, description="Ranks of the group.")
    cpus: float = Field(0.5, ge=0, description="CPU cores reserved per rank.")
    gpus: float = Field(0.0, ge=0, description="GPUs reserved per rank.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Compute dtype (FSDP2 mixed precision).")
    micro_batch: Positive = Field(16, description="Trajectories per forward and backward on one rank.")
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    start_timeout_s: float = Field(300.0, gt=0, description="Deadline to start and load.")
    step_timeout_s: float = Field(600.0, gt=0, description="Deadline for one call on all ranks.")


class ClusterSection(Section):
    """Where the run lives."""

    address: str | None = Field(None, description="Ray address; null starts a local cluster (RAY_ADDRESS wins).")
    local_cpus: Positive | None = Field(
        None, description="CPU slots of the local cluster; null is 4 x the machine's cores (tiny models share)."
    )
    object_store_mib: Positive = Field(512, description="Object store of the local cluster.")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Placement strategy."
    )
    placement_timeout_s: float = Field(60.0, gt=0, description="Longest wait for room.")


class TrackingSection(Section):
    """MLflow. The environment's MLFLOW_TRACKING_URI wins over ``uri``."""

    uri: str | None = Field(None, description="Tracking server; null is sqlite in the run's folder.")
    experiment: str = Field("vans", description="Experiment name.")
    clips_every: int = Field(10, ge=0, description="Steps between logged sample clips; 0 logs none.")


class CheckpointSection(Section):
    """Checkpoints of the run."""

    every: int = Field(20, ge=0, description="Steps between checkpoints; 0 writes one at the end of each stage only.")
    keep: Positive = Field(3, description="Checkpoints kept per stage.")


_ALARMS = AlarmSettings()


class AlarmsSection(Section):
    """Alarms against reward hacking (docs/rewards.md); null turns one off. They warn, and change no reward."""

    motion_below: float | None = Field(
        _ALARMS.motion_below, ge=0, description="Motion as a share of ground truth's, below which clips are frozen."
    )
    copy_above: float | None = Field(
        _ALARMS.copy_above,
        description="CLIP similarity to the last input frame beyond ground truth's own, above which clips are copies.",
    )
    sharpness_range: tuple[float, float] | None = Field(
        _ALARMS.sharpness_range, description="Sharpness as a multiple of the run's first steps'."
    )
    saturation_beyond: float | None = Field(
        _ALARMS.saturation_beyond, gt=0, description="Drift of the mean saturation (0…1) from the run's first steps."
    )
    correlation_below: float | None = Field(
        _ALARMS.correlation_below,
        ge=-1,
        le=1,
        description="Correlation of two rewards, below which one buys the other.",
    )
    format_below: Fraction | None = Field(
        _ALARMS.format_below, description="Share of completions in the asked form (stage 1)."
    )
    length_range: tuple[float, float] | None = Field(
        _ALARMS.length_range, description="Length of the completions as a multiple of the run's first steps' (stage 1)."
    )
    entropy_range: tuple[float, float] | None = Field(
        _ALARMS.entropy_range, description="Token entropy as a multiple of the run's first steps' (stage 1)."
    )
    anchors_below: Fraction | None = Field(
        _ALARMS.anchors_below, description="Share of anchor captions that pass the filter (stage 2)."
    )
    zero_std_above: Fraction | None = Field(
        _ALARMS.zero_std_above, description="Share of groups whose rewards are all equal."
    )
    first_steps: Positive = Field(_ALARMS.first_steps, description="Steps of a stage from which drifts are measured.")
    patience: Positive = Field(
        _ALARMS.patience, description="Steps in a row beyond a threshold that begin an alarm, or within it that end it."
    )
    stop_after: int = Field(
        _ALARMS.stop_after, ge=0, description="Stop the run after the same alarm N steps in a row; 0 never stops it."
    )

    @model_validator(mode="after")
    def _ranges(self) -> AlarmsSection:
        for name in ("sharpness_range", "length_range", "entropy_range"):
            limits = getattr(self, name)
            if limits is not None and not 0 <= limits[0] < 1 < limits[1]:
                raise ValueError(
                    f"{name}={list(limits)}: it is a multiple of the first steps' value, so it must hold 1, e.g. [0.5, 2.0]"
                )
        return self

    @property
    def settings(self) -> AlarmSettings:
        """The same, as ``rewards.alarms`` takes it."""
        return AlarmSettings(**self.model_dump())


class EvaluateSection(Section):
    """Held-out evaluation."""

    samples: Positive = Field(96, description="Held-out samples.")
    render: RenderSection = Field(default_factory=RenderSection)
    text: GreedyTextSection = Field(default_factory=GreedyTextSection)
    seed: int = Field(1234, description="Seed of the evaluation's noise, the same for every system compared.")


class RunConfig(Section):
    """One run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run.")
    seed: int = Field(0, description="Seed of everything sampled.")
    out: Path = Field(Path("runs/run"), description="Folder the run writes to.")
    models: ModelsSection = Field(default_factory=ModelsSection)
    training: Literal["two_stage", "all_in_one"] = Field(
        "two_stage",
        description="Two stages, or the paper's ablation that trains both models in one, on stage 1's steps and both rewards.",
    )
    video: VideoSection = Field(default_factory=VideoSection)
    data: DataSection = Field(default_factory=DataSection)
    sft: SftSection = Field(default_factory=SftSection)
    stage1: Stage1Section = Field(default_factory=Stage1Section)
    stage2: Stage2Section = Field(default_factory=Stage2Section)
    pools: PoolsSection = Field(default_factory=PoolsSection)
    learner: LearnerSection = Field(default_factory=LearnerSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    alarms: AlarmsSection = Field(default_factory=AlarmsSection)
