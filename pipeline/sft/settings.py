"""What a supervised run is told, and what it tells: frozen values; and what a run's configuration comes to."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from actors.learner.settings import OptimSection
from actors.policy.settings import LoraSection
from actors.vdm.settings import ConditioningSection
from actors.vlm.settings import PROMPT, PromptSection
from cluster.errors import ConfigError
from cluster.layout import Strategy
from pipeline.config.schema import RunConfig
from pipeline.config.training import SftLoraSection, SftModelSection, SftOptimSection, SftVdmSection
from pipeline.data.decoder import VideoShape
from pipeline.data.sources import video_limits, video_shape
from pipeline.data.video import VideoLimits

Kind = Literal["vlm", "vdm"]


@dataclass(frozen=True)
class SftSettings:
    """Settings of ``run_sft``; the defaults train the tiny models on a laptop."""

    steps: int | None = 500  # optimizer steps; or
    epochs: float | None = None  # passes over the data; or
    max_wall_s: float | None = None  # seconds of training, all starts together, with a constant learning rate
    batch: int = 64  # samples per step, over all ranks
    micro_batch: int | None = None  # samples per forward on one rank; None: all of them
    optim: OptimSection = field(default_factory=lambda: SftOptimSection(lr=1e-3))
    lora: LoraSection = field(default_factory=SftLoraSection)
    adapter: str | None = None  # PEFT folder to start from
    train_text_encoder: bool = False  # VDM only: train its text encoder jointly
    timesteps: str = "logit_normal"  # VDM only: how noise levels are drawn, and
    weighting: str = "none"  # how they weigh (actors.vdm.flow_sde.FlowMatchingSpec)
    ranks: int = 1
    cpus: float = 1.0  # per rank
    gpus: float = 0.0  # per rank
    placement: Strategy = "PACK"  # how the ranks lie on nodes
    labels: Mapping[str, str] = field(default_factory=dict)  # label selector of the ranks' nodes
    decoders: int = 1  # Ray Data tasks that decode video at a time
    dtype: str = "float32"  # compute dtype; parameters stay float32
    activation_checkpointing: bool = False
    seed: int = 0
    shape: VideoShape = field(default_factory=VideoShape)
    limits: VideoLimits = field(default_factory=VideoLimits)
    reference_frames: int = 2
    conditioning: ConditioningSection = field(default_factory=ConditioningSection)
    prompt: PromptSection = PROMPT
    cache_mib: int = 2048  # decoded samples stay in a rank's memory up to this; larger sets are streamed each epoch
    max_quarantine_ratio: float = 0.05
    checkpoint_every: int = 0  # steps between checkpoints; 0 writes one at the end
    max_failures: int = 0  # times Ray Train restarts the ranks from the last checkpoint
    placement_timeout_s: float = 60.0  # longest wait for room in the cluster
    step_timeout_s: float = 600.0  # longest silence of a rank, and longest collective
    log_every: int = 10
    policy_kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments of the policy's load

    def __post_init__(self) -> None:
        if sum(limit is not None for limit in (self.steps, self.epochs, self.max_wall_s)) != 1:
            raise ConfigError(
                f"sft: give one of steps, epochs and max_wall_s (steps={self.steps}, epochs={self.epochs}, "
                f"max_wall_s={self.max_wall_s})"
            )
        if self.max_wall_s is not None and self.optim.schedule != "constant":
            raise ConfigError(
                f"sft: max_wall_s needs schedule=constant, since nobody knows where {self.optim.schedule} ends"
            )
        if self.ranks < 1 or self.batch < self.ranks or self.batch % self.ranks:
            raise ConfigError(f"sft: batch={self.batch} must be a multiple of ranks={self.ranks}")
        if self.adapter is not None and self.lora.rank == 0:
            raise ConfigError("sft: an adapter to start from needs lora.rank > 0, equal to the adapter's")
        if self.train_text_encoder and self.lora.rank:
            raise ConfigError("sft: train_text_encoder trains full weights; it cannot go with lora.rank > 0")
        if self.log_every < 1:
            raise ConfigError(f"sft: log_every={self.log_every} must be at least 1")

    def facts(self) -> dict[str, Any]:
        """Return the settings under the flat names of ``sft.json``, MLflow and a checkpoint's digest."""
        found = asdict(self)
        optim, lora = found.pop("optim"), found.pop("lora")
        return found | dict(optim) | {f"lora_{name}": value for name, value in lora}

    def total_steps(self, samples: int) -> int:
        """Return the optimizer steps that ``samples`` samples make; ``max_wall_s`` alone sets no number."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            return sys.maxsize
        return max(1, round(self.epochs * samples / self.batch))


def sft_settings(config: RunConfig, kind: Kind) -> SftSettings:
    """Return the settings by which ``config`` tunes its model of ``kind``.

    Raises ConfigError where the section ``sft`` says nothing of the length, or contradicts another section.
    """
    section: SftModelSection = getattr(config.sft, kind)
    if section.steps is None and section.epochs is None and section.max_wall_s is None:
        raise ConfigError(f"sft.{kind}: give one of steps, epochs and max_wall_s, e.g. sft.{kind}.epochs=1")
    learner, data = config.learner, config.data
    vdm = section if isinstance(section, SftVdmSection) else SftVdmSection()
    return SftSettings(
        steps=section.steps,
        epochs=section.epochs,
        max_wall_s=section.max_wall_s,
        batch=section.batch,
        micro_batch=section.micro_batch,
        optim=section.optim,
        lora=section.lora,
        adapter=getattr(config.models, f"{kind}_adapter"),
        train_text_encoder=vdm.train_text_encoder,
        timesteps=vdm.timesteps,
        weighting=vdm.weighting,
        ranks=learner.ranks,
        cpus=learner.cpus,
        gpus=float(math.ceil(learner.gpus)),  # nothing else runs then, so a share would only put two ranks on a GPU
        placement=learner.placement or config.cluster.placement,
        labels=learner.labels,
        dtype=learner.dtype,
        activation_checkpointing=learner.activation_checkpointing,
        seed=config.seed,
        shape=video_shape(config),
        limits=video_limits(config),
        reference_frames=config.video.reference_frames,
        conditioning=config.video.conditioning,
        prompt=config.models.prompt,
        decoders=data.decoders,
        max_quarantine_ratio=data.max_quarantine_ratio,
        cache_mib=section.cache_mib,
        checkpoint_every=section.checkpoint_every,
        max_failures=section.max_failures,
        placement_timeout_s=config.cluster.placement_timeout_s,
        step_timeout_s=learner.step_timeout_s,
        log_every=section.log_every,
        policy_kwargs={
            "shift": config.models.flow_shift,
            "shared_times": config.models.shared_times,
            "vae_tiling": config.video.vae_tiling,
            "negative_prompt": config.models.negative_prompt or "",
        }
        if kind == "vdm"
        else {"engine_dtype": config.pools.vlm.dtype},
    )


@dataclass(frozen=True)
class SftResult:
    """What came out: the exported folder and the figures on the way (also in ``sft.json`` inside it)."""

    folder: Path
    steps: int
    samples: int
    quarantined: int
    loss_first: float  # mean of the first log_every steps
    loss_last: float  # mean of the last log_every steps
    history: list[dict[str, float]]  # step, loss, lr, grad_norm, skipped, samples_per_s
    train_s: float  # seconds of training, those before a restart included: what max_wall_s bounds
    wall_s: float  # of this call, start-up and export included
