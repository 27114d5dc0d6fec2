"""What a user may write in a run's YAML: pydantic models, unknown keys rejected, every key with a sentence.

The sections of one subject stand together (``training``, ``stages``, ``machinery``); this module joins them to a run. Types, defaults
and contradictions only; reading files and overrides is ``pipeline.config.load``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.learner.settings import LearnerSection
from actors.scoring.settings import RewardModelSection, RewardName
from actors.settings import FREE, Fraction, Positive, Section, cite
from actors.vdm.settings import ConditioningSection, Tiling
from actors.vlm.settings import PromptSection
from pipeline.config.machinery import (
    AlarmsSection,
    CheckpointSection,
    ClusterSection,
    ControlSection,
    TrackingSection,
    WeightsSection,
)
from pipeline.config.stages import GreedyTextSection, RenderSection, Stage1Section, Stage2Section
from pipeline.config.training import SftSection
from pipeline.fleet.kinds import KINDS, PoolsSection
from pipeline.fleet.rewards import require_rewards
from pipeline.serve.settings import ServeSection
from pipeline.support.location import LocalPath, Location, Uri, opened


class ModelsSection(Section):
    """Where the models come from: a local folder, ``tiny`` for the pair in this repository, or a hub name."""

    vlm: str = Field("tiny", description="Vision-language model: transformers folder or hub name.")
    vdm: str = Field(
        "tiny",
        description="Video diffusion model: diffusers pipeline folder or hub name, of a family in docs/models.md.",
    )
    clip: str = Field("tiny", description="CLIP model that scores: transformers folder or hub name.")
    vlm_adapter: str | None = Field(None, description="PEFT adapter folder the VLM starts from.")
    vdm_adapter: str | None = Field(None, description="PEFT adapter folder the VDM starts from.")
    rewards: dict[RewardName, RewardModelSection] = Field(
        default_factory=dict,
        description="Reward with a model of its own → `model` (`module:Class`), `options` (of the class), `dtype` (docs/rewards.md).",
    )
    prompt: PromptSection = Field(default_factory=PromptSection)
    negative_prompt: str | None = Field(
        None,
        description="What the artist is led away from under guidance, and in its SFT the caption in the place of a dropped one; null "
        "is an empty text.",
        json_schema_extra=cite("classifier-free guidance", "VANS as released"),
    )
    flow_shift: float = Field(
        3.0,
        gt=0,
        description="Shift of the artist's flow-matching sigma grid, as in its SFT.",
        json_schema_extra=cite("rectified flow"),
    )
    flow_grid: Literal["diffusers", "even"] = Field(
        "diffusers",
        description="Euler steps of the artist. diffusers: those of its FlowMatchEulerDiscreteScheduler, the last one from the shifted "
        "1/1000 of the noise; even: equal steps from 1 to 0, then shifted, as the release draws.",
        json_schema_extra=cite("rectified flow", "VANS as released"),
    )
    shared_times: bool = Field(
        True,
        description="Whether the artist embeds the two times of a clip's tokens (clean and noisy) once each instead of token by "
        "token: the same values, less work.",
    )


class VideoSection(Section):
    """Shape of the clips. Paper: n=6 reference frames, 33 frames of 352x640."""

    num_frames: Positive = Field(
        9,
        description="Frames of a rendered clip: 4k+1, or what the artist's causal VAE takes (LTX-Video: 8k+1; Wan image to video: 4k, "
        "since the frame that it is given is not counted).",
    )
    height: Positive = Field(32, description="Height of rendered and target frames in pixels.")
    width: Positive = Field(32, description="Width of rendered and target frames in pixels.")
    fps: float = Field(
        8.0,
        gt=0,
        description="Frames per second of the clips: written to mp4 answers (the release writes 11), and told to an artist whose "
        "position embedding counts seconds (LTX-Video).",
    )
    input_frames: Positive = Field(9, description="Frames of the input video that the VLM sees, sampled uniformly.")
    vlm_height: Positive = Field(32, description="Height of the frames that the VLM sees.")
    vlm_width: Positive = Field(32, description="Width of the frames that the VLM sees.")
    vlm_pixels: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = Field(
        None,
        description="Least and most pixels of a frame that the VLM sees: each video keeps its shape, in sizes of multiples of "
        "vlm_multiple, and nothing is cropped. Null: all are vlm_height x vlm_width. The release: [100352, 602112].",
        json_schema_extra=cite("VANS as released"),
    )
    vlm_multiple: Positive = Field(
        28,
        description="What sides under vlm_pixels are multiples of: patch times merge of the VLM, 28 for Qwen2.5-VL, 32 for Qwen3-VL.",
    )
    vlm_fps: float | None = Field(
        None,
        gt=0,
        description="Rate of the frames that the VLM sees, as it is told: it reads time from it. Null: their own, by the video's "
        "clock. The release: 2, whatever the video, since it tells its processor none.",
        json_schema_extra=cite("VANS as released"),
    )
    reference_frames: Positive = Field(
        2,
        description="Reference frames that condition the VDM (n), last input frame included; conditioning.references=clip has take "
        "instead. Wan image to video takes 1.",
    )
    conditioning: ConditioningSection = Field(default_factory=ConditioningSection)
    vae_tiling: bool = Field(
        False,
        description="Encode and decode large frames in overlapping tiles: less memory, slightly other pixels.",
    )
    vae_tile: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = Field(
        None,
        description="Height and width of a tile in pixels; null is the VAE's own (Wan: 256, LTX-Video: 512). The release: [240, 416].",
        json_schema_extra=cite("VANS as released"),
    )
    vae_stride: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = Field(
        None,
        description="Pixels from a tile's begin to the next one's; null is the VAE's own (Wan: 192, LTX-Video: 448). The release: "
        "[120, 208].",
        json_schema_extra=cite("VANS as released"),
    )

    @property
    def context_frames(self) -> int | None:
        """Frames of the input video that the artist gets, where they are not those that the thinker sees."""
        return self.num_frames if self.conditioning.references == "clip" else None

    @property
    def tiling(self) -> Tiling | None:
        """How the VAE's frames are cut; None: not at all."""
        return Tiling(self.vae_tile, self.vae_stride) if self.vae_tiling else None

    @property
    def vlm_largest(self) -> tuple[int, int]:
        """Height and width of the largest frames that the VLM sees; under vlm_pixels a square of nearly as many pixels."""
        if self.vlm_pixels is None:
            return self.vlm_height, self.vlm_width
        side = max(1, math.isqrt(self.vlm_pixels[1]) // self.vlm_multiple) * self.vlm_multiple
        return side, side

    @model_validator(mode="after")
    def _budget(self) -> VideoSection:
        if self.vlm_pixels is None:
            return self
        (least, most), unit = self.vlm_pixels, self.vlm_multiple**2
        if most < max(unit, least):
            raise ValueError(
                f"vlm_pixels=[{least}, {most}] leaves no size: the most must be at least the least, and vlm_multiple squared ({unit})"
            )
        return self

    @model_validator(mode="after")
    def _tiles(self) -> VideoSection:
        if (self.vae_tile is None) != (self.vae_stride is None):
            raise ValueError("vae_tile and vae_stride go together: give both, or none")
        pairs = zip(self.vae_stride or (), self.vae_tile or (), strict=True)
        if any(step > side for step, side in pairs):
            raise ValueError(
                f"vae_stride={self.vae_stride} is beyond vae_tile={self.vae_tile}: pixels between two tiles would be lost"
            )
        return self

    @model_validator(mode="after")
    def _causal_vae(self) -> VideoSection:
        if self.num_frames % 4 not in (0, 1):
            down = self.num_frames // 4 * 4
            more = " or ".join(str(n) for n in (down, down + 4) if n)
            raise ValueError(
                f"num_frames={self.num_frames} must be 4k+1 (a causal VAE drops other frames silently), e.g. {down + 1} or "
                f"{down + 5}; or 4k of an artist whose clips begin with the input's last frame, e.g. {more}"
            )
        return self


class DataSection(Section):
    """Parquet shards of VNEP samples (see docs/data.md for the columns)."""

    train: Location = Field(
        Path("data/toy/train"),
        description="Folder of Parquet shards to train on: a path, or a URI such as s3://bucket/folder.",
    )
    eval: Location = Field(
        Path("data/toy/test"), description="Folder of Parquet shards to evaluate on, path or URI; never trained on."
    )
    val: Location | None = Field(
        None,
        description="Folder of Parquet shards that evaluate.every asks, path or URI: what is chosen is chosen on these, so that "
        "data.eval is asked once. Never trained on.",
        json_schema_extra=FREE,
    )
    seed: int = Field(0, description="Seed of the sample order; the order is a pure function of (seed, epoch).")
    max_quarantine_ratio: Fraction = Field(
        0.05, description="Share of undecodable rows above which the run stops.", json_schema_extra=FREE
    )
    decoders: Positive = Field(1, description="Ray Data workers that decode video.")
    max_pixels: Positive = Field(3840 * 2160, description="Largest frame accepted, in pixels.")
    max_source_frames: Positive = Field(20000, description="Most frames read from one source video.")
    max_source_s: float = Field(
        3600.0, gt=0, description="Longest source video, or part of one, in seconds.", json_schema_extra=FREE
    )
    max_source_mib: Positive = Field(512, description="Largest file of a source video in MiB.", json_schema_extra=FREE)
    max_decode_s: float = Field(
        300.0,
        gt=0,
        description="Longest time in seconds for one pass over a source video; a slower one is quarantined.",
        json_schema_extra=FREE,
    )


class EvaluateSection(Section):
    """Held-out evaluation: by ``vans evaluate`` on data.eval, and with ``every`` on data.val while a run trains."""

    samples: Positive = Field(96, description="Held-out samples.")
    every: int = Field(
        0,
        ge=0,
        description="Steps between evaluations while a stage trains, the first before its first step; 0 is off.",
    )
    subset: Positive = Field(
        32,
        description="Samples of data.val that they ask, the same each time: chosen by the run's seed and the samples' ids.",
    )
    metric: str = Field(
        "clip_v",
        description="Metric by which a checkpoint is the best, which is kept and exported as best; docs/evaluation.md lists them.",
    )
    rewards: list[str] = Field(
        [],
        description="Rewards that answers are measured by beside the table's own metrics, such as video_similarity: a row each. "
        "Named as in rewards.weights; one with a model has its pool, also where no stage weighs it.",
    )
    stop_if_not_better: int = Field(
        0, ge=0, description="Evaluations in a row without a new best of the stage after which it ends; 0 is never."
    )
    render: RenderSection = Field(default_factory=RenderSection)
    text: GreedyTextSection = Field(default_factory=GreedyTextSection)
    seed: int = Field(1234, description="Seed of the evaluation's noise, the same for every system compared.")


class RunConfig(Section):
    """One run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run.", json_schema_extra=FREE
    )
    seed: int = Field(0, description="Seed of everything sampled.")
    out: LocalPath = Field(
        Path("runs/run"),
        description="Folder the run writes to, on this machine; checkpoint.mirror copies it to a store.",
        json_schema_extra=FREE,
    )
    deterministic: bool = Field(
        False,
        description="Compute every answer of a pool alone, so that no figure depends on what else was waiting: the same run, killed "
        "and resumed or not, has bitwise the same metrics and weights. CPU and float32 only, and slower.",
    )
    models: ModelsSection = Field(default_factory=ModelsSection)
    training: Literal["two_stage", "all_in_one"] = Field(
        "two_stage",
        description="Two stages, or the paper's ablation that trains both models in one, on stage 1's steps and both rewards.",
    )
    video: VideoSection = Field(default_factory=VideoSection)
    data: DataSection = Field(default_factory=DataSection)
    sft: SftSection = Field(default_factory=SftSection, json_schema_extra=FREE)
    stage1: Stage1Section = Field(default_factory=Stage1Section)
    stage2: Stage2Section = Field(default_factory=Stage2Section)
    pools: PoolsSection = Field(default_factory=PoolsSection, json_schema_extra=FREE)
    learner: LearnerSection = Field(default_factory=LearnerSection)
    weights: WeightsSection = Field(default_factory=WeightsSection, json_schema_extra=FREE)
    cluster: ClusterSection = Field(default_factory=ClusterSection, json_schema_extra=FREE)
    tracking: TrackingSection = Field(default_factory=TrackingSection, json_schema_extra=FREE)
    control: ControlSection = Field(default_factory=ControlSection, json_schema_extra=FREE)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, json_schema_extra=FREE)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, json_schema_extra=FREE)
    alarms: AlarmsSection = Field(default_factory=AlarmsSection, json_schema_extra=FREE)
    serve: ServeSection = Field(default_factory=ServeSection, json_schema_extra=FREE)

    @model_validator(mode="after")
    def _collective(self) -> RunConfig:
        if self.weights.transport != "collective":
            return self
        stages = {"stage1": ("vlm", self.stage1), "stage2": ("vdm", self.stage2)}
        whole = {name: pool for name, (pool, stage) in stages.items() if stage.lora.rank == 0}
        if not whole:
            raise ValueError(
                "weights.transport=collective carries full weights, and this run trains adapters alone (stage1.lora.rank="
                f"{self.stage1.lora.rank}, stage2.lora.rank={self.stage2.lora.rank}); use object_store, or lora.rank: 0"
            )
        sections = {"learner": self.learner} | {f"pools.{name}": getattr(self.pools, name) for name in whole.values()}
        shared = [f"{name}.gpus={section.gpus:g}" for name, section in sections.items() if 0 < section.gpus < 1]
        if shared:
            raise ValueError(
                f"weights.transport=collective with {', '.join(shared)}: NCCL takes no two processes on one GPU; give the learner "
                "and the pool whole GPUs of their own, or use object_store"
            )
        if self.cluster.layout == "colocated":
            raise ValueError(
                "weights.transport=collective with cluster.layout=colocated: NCCL takes no two processes on one GPU; use object_store"
            )
        mixed = {name: section.gpus > 0 for name, section in sections.items()}
        if len(set(mixed.values())) > 1:
            raise ValueError(
                "weights.transport=collective needs the learner and its pool on the same kind of device, here "
                f"{', '.join(f'{name}.gpus={section.gpus:g}' for name, section in sections.items())}; use object_store"
            )
        longest = self.weights.join_timeout_s + self.weights.transfer_timeout_s
        for name in whole.values():
            deadline = getattr(self.pools, name).start_timeout_s
            if longest >= deadline:
                raise ValueError(
                    f"weights.join_timeout_s + weights.transfer_timeout_s = {longest:g} s leave no time to pull the weights instead: "
                    f"a worker has pools.{name}.start_timeout_s={deadline:g} s to load them; shorten the one or lengthen the other"
                )
        return self

    @model_validator(mode="after")
    def _reward_models(self) -> RunConfig:
        require_rewards(self, KINDS)
        return self

    @model_validator(mode="after")
    def _one_stage(self) -> RunConfig:
        if self.training == "all_in_one" and self.stage2.learning.samples == "ends":
            raise ValueError(
                f"stage2.objective={self.stage2.objective} with training=all_in_one: its clips are sampled as an SDE, whose steps "
                "grpo alone learns from; use stage2.objective: grpo, or training: two_stage"
            )
        return self

    @model_validator(mode="after")
    def _rest(self) -> RunConfig:
        resting = [f"pools.{name}.rest=true" for name, section in self.pools.sections().items() if section.rest]
        stale = [
            f"{name}.rollout.max_staleness={stage.rollout.max_staleness}"
            for name, stage in (("stage1", self.stage1), ("stage2", self.stage2))
            if stage.rollout.max_staleness
        ]
        if resting and stale:
            raise ValueError(
                f"{', '.join(resting)} with {', '.join(stale)}: a pool that rests while the learner works cannot sample meanwhile; "
                "set max_staleness: 0, or give the pool GPUs of its own and rest: false"
            )
        return self

    @model_validator(mode="after")
    def _held_out(self) -> RunConfig:
        if not self.evaluate.every:
            return self
        data = self.data
        if data.val is None:
            raise ValueError(
                f"evaluate.every={self.evaluate.every} asks samples of data.val, which is not set: name a folder of shards that "
                "is neither trained on nor reported on, such as data/toy/val"
            )
        for name in ("train", "eval"):
            if str(data.val) == str(getattr(data, name)):
                raise ValueError(
                    f"data.val={data.val} is data.{name} too: a best that is chosen on what is trained on or reported on says "
                    "nothing; name another folder"
                )
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            apart = [f"{name}.optim.ema={stage.optim.ema:g}"] if stage.optim.ema else []
            apart += [f"{name}.{stage.objective}.behaviour_decay"] if stage.learning.samples_apart() else []
            if apart and stage.rollout.max_staleness:
                raise ValueError(
                    f"evaluate.every={self.evaluate.every} with {' and '.join(apart)} and {name}.rollout.max_staleness="
                    f"{stage.rollout.max_staleness}: what an export holds would be served while rollouts are under way; set "
                    "max_staleness: 0, or the other to 0"
                )
        return self

    @model_validator(mode="after")
    def _mirror_elsewhere(self) -> RunConfig:
        mirror = self.checkpoint.mirror
        if isinstance(mirror, Uri) and mirror.scheme == "file":
            mirror = Path(opened(mirror)[1])
        if isinstance(mirror, Path) and (mirror.resolve() == self.out.resolve()):
            raise ValueError(
                f"checkpoint.mirror={mirror} is the run's own folder (out): name another place, best on another machine"
            )
        return self

    @model_validator(mode="after")
    def _determinism(self) -> RunConfig:
        if not self.deterministic:
            return self
        sections = {f"pools.{name}": section for name, section in self.pools.sections().items()}
        reasons = [
            f"{name}.{key}={value}"
            for name, section in (sections | {"learner": self.learner}).items()
            for key, exact in (("gpus", 0.0), ("dtype", "float32"))
            if (value := getattr(section, key, exact)) != exact
        ]
        reasons += [
            f"{name}.rollout.max_staleness={stage.rollout.max_staleness}"
            for name, stage in (("stage1", self.stage1), ("stage2", self.stage2))
            if stage.rollout.max_staleness
        ]
        if reasons:
            raise ValueError(
                f"deterministic=true cannot be kept with {', '.join(reasons)}: it needs float32 on CPUs, and rollouts of the "
                "newest weights only (max_staleness: 0)"
            )
        return self
