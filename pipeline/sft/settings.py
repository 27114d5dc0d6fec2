"""What a supervised run is told, and what it tells: frozen values; and what a run's configuration comes to."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from actors.learner.settings import LearnerSection
from actors.vdm.settings import ConditioningSection
from actors.vlm.settings import PROMPT, PromptSection
from cluster.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.config.training import SftModelSection, SftOptimSection, SftVdmSection
from pipeline.data.decoder import VideoShape
from pipeline.data.sources import video_limits, video_shape
from pipeline.data.video import VideoLimits
from pipeline.fleet.models import vdm_options

Kind = Literal["vlm", "vdm"]


TUNING = (
    *("steps", "epochs", "max_wall_s", "batch", "micro_batch"),
    *("checkpoint_every", "max_failures", "log_every", "cache_mib"),
)
VDM = ("train_text_encoder", "timesteps", "weighting")
RANKS = ("ranks", "cpus", "gpus", "placement", "labels", "dtype", "activation_checkpointing", "step_timeout_s")
"""What of ``tuning``, ``vdm`` and ``learner`` is recorded; the other keys of a learner are Joint-GRPO's."""


@dataclass(frozen=True)
class SftSettings:
    """Settings of ``run_sft``: a run's sections, and what it derives from others. The defaults train the tiny models on a laptop."""

    tuning: SftModelSection = field(
        default_factory=lambda: SftModelSection(steps=500, optim=SftOptimSection(lr=1e-3), checkpoint_every=0)
    )
    learner: LearnerSection = field(default_factory=lambda: LearnerSection(ranks=1, cpus=1.0, placement="PACK"))
    adapter: str | None = None  # PEFT folder to start from
    decoders: int = 1  # Ray Data tasks that decode video at a time
    seed: int = 0
    shape: VideoShape = field(default_factory=VideoShape)
    limits: VideoLimits = field(default_factory=VideoLimits)
    reference_frames: int = 2
    conditioning: ConditioningSection = field(default_factory=ConditioningSection)
    prompt: PromptSection = PROMPT
    max_quarantine_ratio: float = 0.05
    placement_timeout_s: float = 60.0  # longest wait for room in the cluster
    can_grow: bool = False  # whether an autoscaler adds nodes
    policy_kwargs: dict[str, Any] = field(default_factory=dict)  # more arguments of the policy's load

    def __post_init__(self) -> None:
        tuning, ranks = self.tuning, self.learner.ranks
        if tuning.steps is None and tuning.epochs is None and tuning.max_wall_s is None:
            raise ConfigError("sft: give one of steps, epochs and max_wall_s")
        if tuning.batch % ranks:
            raise ConfigError(f"sft: batch={tuning.batch} must be a multiple of ranks={ranks}")
        if self.adapter is not None and tuning.lora.rank == 0:
            raise ConfigError("sft: an adapter to start from needs lora.rank > 0, equal to the adapter's")

    @property
    def vdm(self) -> SftVdmSection:
        """What is tuned of a VDM alone; for a VLM the defaults, which nothing reads."""
        return self.tuning if isinstance(self.tuning, SftVdmSection) else SftVdmSection()

    @property
    def train_text_encoder(self) -> bool:
        """Whether the VDM's text encoder is trained too."""
        return self.vdm.train_text_encoder

    def facts(self) -> dict[str, Any]:
        """Return the settings under the flat names of ``sft.json``, MLflow and a checkpoint's digest."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("tuning", "learner")}
        found |= {"shape": asdict(self.shape), "limits": asdict(self.limits)}
        found |= {name: getattr(self.tuning, name) for name in TUNING}
        found |= {name: getattr(self.learner, name) for name in RANKS}
        found |= {name: getattr(self.vdm, name) for name in VDM} | dict(self.tuning.optim)
        return found | {f"lora_{name}": value for name, value in self.tuning.lora}

    def total_steps(self, samples: int) -> int:
        """Return the optimizer steps that ``samples`` samples make; ``max_wall_s`` alone sets no number."""
        if self.tuning.steps is not None:
            return self.tuning.steps
        if self.tuning.epochs is None:
            return sys.maxsize
        return max(1, round(self.tuning.epochs * samples / self.tuning.batch))


def sft_settings(config: RunConfig, kind: Kind) -> SftSettings:
    """Return the settings by which ``config`` tunes its model of ``kind``.

    Raises ConfigError where the section ``sft`` says nothing of the length, or contradicts another section.
    """
    section: SftModelSection = getattr(config.sft, kind)
    if section.steps is None and section.epochs is None and section.max_wall_s is None:
        raise ConfigError(f"sft.{kind}: give one of steps, epochs and max_wall_s, e.g. sft.{kind}.epochs=1")
    learner = config.learner
    where = {
        "gpus": float(math.ceil(learner.gpus)),  # nothing else runs then, so a share would only put two ranks on a GPU
        "placement": learner.placement or config.cluster.placement,
    }
    return SftSettings(
        tuning=section,
        learner=learner.model_copy(update=where),
        adapter=getattr(config.models, f"{kind}_adapter"),
        seed=config.seed,
        shape=video_shape(config),
        limits=video_limits(config),
        reference_frames=config.video.reference_frames,
        conditioning=config.video.conditioning,
        prompt=config.models.prompt,
        decoders=config.data.decoders,
        max_quarantine_ratio=config.data.max_quarantine_ratio,
        placement_timeout_s=config.cluster.placement_timeout_s,
        can_grow=config.cluster.can_grow,
        policy_kwargs=vdm_options(config) if kind == "vdm" else {"engine_dtype": config.pools.vlm.dtype},
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
