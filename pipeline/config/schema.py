"""What a user may write in a run's YAML: pydantic models, unknown keys rejected, every key with a sentence.

This module holds types, defaults and contradictions only; reading files and overrides is ``pipeline.config.load``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rewards.alarms import AlarmSettings

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


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
    flow_shift: float = Field(3.0, gt=0, description="Shift of the artist's flow-matching sigma grid, as in its SFT.")


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

    rank: int = Field(8, ge=0, description="LoRA rank; 0 trains the full weights.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha.")
    targets: list[str] | None = Field(None, description="Module name suffixes; default: attention and MLP projections.")


class OptimSection(Section):
    """AdamW and what surrounds it."""

    lr: float = Field(5e-5, gt=0, description="Learning rate. Paper: 5e-5.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up, in optimizer steps.")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="Learning rate after warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping by global norm.")
    max_skipped_steps: int = Field(
        5, ge=0, description="Non-finite gradients skip a step; more than this stop the run."
    )


class GrpoSection(Section):
    """Group-relative policy optimisation (ALGORITHM.md: GRPO, common to both stages)."""

    clip_low: float = Field(0.2, gt=0, description="Lower clip range of the ratio.")
    clip_high: float = Field(0.2, gt=0, description="Upper clip range of the ratio (DAPO clip-higher).")
    kl_beta: float = Field(0.0, ge=0, description="Weight of the KL to the reference policy.")
    std_norm: Literal["group", "batch", "none"] = Field(
        "group", description="Standard deviation that divides advantages; none is Dr.GRPO."
    )
    normalise_rewards: bool = Field(
        False, description="Normalise each reward component within its group before the weighted sum."
    )
    loss_norm: Literal["token", "sequence", "constant"] = Field(
        "token", description="Token (DAPO), sequence (paper) or constant (Dr.GRPO)."
    )
    old_logprobs: Literal["learner", "rollout"] = Field(
        "learner", description="Who computes the old log-probabilities."
    )
    importance_cap: float = Field(
        2.0, gt=0, description="Cap C of truncated importance weights, used with old_logprobs=rollout."
    )
    updates_per_batch: Positive = Field(
        1, description="Optimizer steps per rollout batch (its groups are split evenly)."
    )
    min_group: int = Field(2, ge=2, description="A group with fewer scored members is dropped.")


class RolloutSection(Section):
    """How a batch of trajectories is sampled."""

    prompts_per_step: Positive = Field(8, description="Samples (groups) per optimizer batch.")
    group_size: int = Field(8, description="Trajectories per group, G. Paper: 8.")
    max_staleness: int = Field(0, ge=0, description="Steps by which rollout weights may lag; 0 is synchronous.")

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
    guidance: float = Field(1.0, ge=1.0, description="Classifier-free guidance scale; 1 is off.")


class TextSamplingSection(Section):
    """How the VLM samples."""

    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    max_tokens: Positive = Field(48, description="Longest completion in tokens.")


class RewardsSection(Section):
    """Component name → weight. A name is built in (see docs/rewards.md) or a dotted path ``module:function``."""

    weights: dict[str, float] = Field(default_factory=dict, description="Weights of the components in the total.")


class SdeSection(Section):
    """Stochastic sampling of the flow (Flow-GRPO, DanceGRPO, MixGRPO window)."""

    schedule: Literal["flow", "wan", "dance", "cps"] = Field("flow", description="Noise schedule s(sigma).")
    level: float = Field(0.7, ge=0, description="Noise level a (flow, cps), eta (dance) or sigma_max (wan).")
    window_size: Positive = Field(2, description="Stochastic, trained steps per trajectory.")
    window_range: tuple[int, int] | None = Field(
        None, description="Steps [first, last) within which the window moves; default: all but the last."
    )
    window_schedule: Literal["fixed", "progressive", "random"] = Field("random", description="How the window moves.")
    window_every: Positive = Field(1, description="Optimizer steps between moves of the window.")
    same_latent: bool = Field(True, description="All members of a group start from the same noise.")


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


class Stage1Section(StageSection):
    """Visualization-friendly VLM tuning (paper, stage 1)."""

    rewards: RewardsSection = Field(RewardsSection(weights={"format": 1.0, "rouge_l": 1.0, "clip_v": 1.0}))
    dedupe: bool = Field(True, description="Render equal captions of a group once.")


class Stage2Section(StageSection):
    """Context-faithful VDM adaptation (paper, stage 2)."""

    rewards: RewardsSection = Field(RewardsSection(weights={"clip_v": 1.0, "clip_score": 1.0}))
    grpo: GrpoSection = Field(GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.004, loss_norm="sequence"))
    sde: SdeSection = Field(default_factory=SdeSection)
    anchor_min_rouge: Fraction = Field(
        0.6, description="Anchor captions with a lower ROUGE-L to ground truth are dropped. Paper: 0.6."
    )
    anchor_max_draws: Positive = Field(8, description="Batches drawn in search of enough anchors before the run stops.")

    @model_validator(mode="after")
    def _window(self) -> Stage2Section:
        first, last = self.sde.window_range or (0, self.render.steps - 1)
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

    max_batch: Positive = 1
    max_inflight: Positive = 64
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
    text: TextSamplingSection = Field(TextSamplingSection(temperature=0.0))
    seed: int = Field(1234, description="Seed of the evaluation's noise, the same for every system compared.")


class RunConfig(Section):
    """One run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run.")
    seed: int = Field(0, description="Seed of everything sampled.")
    out: Path = Field(Path("runs/run"), description="Folder the run writes to.")
    models: ModelsSection = Field(default_factory=ModelsSection)
    video: VideoSection = Field(default_factory=VideoSection)
    data: DataSection = Field(default_factory=DataSection)
    stage1: Stage1Section = Field(default_factory=Stage1Section)
    stage2: Stage2Section = Field(default_factory=Stage2Section)
    pools: PoolsSection = Field(default_factory=PoolsSection)
    learner: LearnerSection = Field(default_factory=LearnerSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    alarms: AlarmsSection = Field(default_factory=AlarmsSection)
