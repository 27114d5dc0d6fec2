"""Records that travel between rooms: frozen dataclasses of numbers, text and numpy arrays, nothing that holds a device or a handle.

Frames are always ``uint8 (T, H, W, 3)`` RGB. Latents are ``float32``. Every result carries the weights version that made it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from actors.vdm.schedules import NoiseSchedule

SampleKind = Literal["procedural", "predictive"]


def derive_seed(*parts: Any) -> int:
    """Return a 63-bit seed that is a pure function of ``parts`` (run seed, step, sample id, index, …).

    The same parts give the same seed on any machine and Python version, so a request that is sent again repeats itself.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, eq=False)
class VideoQuestion:
    """What the thinker is asked: ``question`` about ``frames`` that are shown at ``fps`` frames per second.

    ``fps`` is the rate of these very frames, not that of the file they were taken from, nor that of the answers. It has
    no default: the model reads it as time.
    """

    question: str
    frames: np.ndarray  # uint8 (T, H, W, 3)
    fps: float


@dataclass(frozen=True, eq=False)
class Sample:
    """One VNEP question: what is asked about which video, and the true next event."""

    id: str
    kind: SampleKind
    question: str
    caption: str
    input_frames: np.ndarray  # uint8 (T_in, H, W, 3)
    target_frames: np.ndarray  # uint8 (T_out, H, W, 3)
    fps: float = 8.0  # of input_frames
    meta: str = ""  # JSON of whatever the dataset's maker wants back at evaluation
    context_frames: np.ndarray | None = (
        None  # uint8 (T', H', W', 3), input as the artist sees it, at the render size; None: input_frames are
    )
    answer: str | None = None  # <think>…</think><ans>…</ans> for SFT, where the dataset has one

    @property
    def asked(self) -> VideoQuestion:
        """What the thinker is asked about this sample, in training and in use alike."""
        return VideoQuestion(self.question, self.input_frames, self.fps)

    @property
    def context(self) -> np.ndarray:
        """The input as the artist sees it, at the render size, uint8 (T', H', W', 3)."""
        return self.input_frames if self.context_frames is None else self.context_frames


# --- VLM ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CompletionRequest:
    """Ask the VLM for ``n`` completions about one video."""

    sample_id: str
    asked: VideoQuestion
    n: int
    seed: int
    temperature: float = 1.0  # 0 is greedy
    max_tokens: int = 64
    top_p: float = 1.0  # share of probability that is sampled from; below 1 nothing may be learnt from the completions


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled answer; ``logprobs[t]`` is the engine's log-probability of ``token_ids[t]`` (EOS included when it was sampled)."""

    text: str
    token_ids: np.ndarray  # int32 (L,)
    logprobs: np.ndarray  # float32 (L,)
    finish_reason: str  # "stop" | "length"
    weights_version: int


# --- VDM ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SdeSpec:
    """Which steps are stochastic, and how. ``window`` is [start, start+size); all other steps are ODE steps."""

    schedule: NoiseSchedule
    level: float
    window_start: int
    window_size: int
    reach: tuple[int, int] | None = None  # steps [first, last) within which the window was placed; None: its own


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What frozen models made of a caption and of reference frames: made once, it travels to whoever needs it.

    Float32 whatever the encoder's dtype: bfloat16 values survive it exactly.
    """

    text: np.ndarray  # float32 (tokens, D), the caption's embedding without padding
    negative: np.ndarray | None  # float32 (tokens, D) of the negative prompt; None without guidance
    references: np.ndarray | None  # float32 (C, n, h, w), clean latents before the target; None without any
    max_tokens: int  # to how many tokens the transformer wants the text padded
    image: np.ndarray | None = None  # float32 (tokens, D), of the artist's image encoder; None where it has none


@dataclass(frozen=True, eq=False)
class EmbedRequest:
    """Ask the embed pool for a caption's embedding, float32 (tokens, D); None is the negative prompt."""

    caption: str | None


@dataclass(frozen=True, eq=False)
class EncodeRequest:
    """Ask the embed pool what the frozen models make of n reference frames of a clip of ``num_frames`` frames."""

    sample_id: str
    reference_frames: np.ndarray  # uint8 (n, H, W, 3), RGB
    num_frames: int


@dataclass(frozen=True, eq=False)
class FrameEncoding:
    """The embed pool's answer to an :class:`EncodeRequest`."""

    latents: np.ndarray  # float32 (C, n', h, w)
    image: np.ndarray | None  # float32 (tokens, D), of the artist's image encoder; None where it has none

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return int(self.latents.nbytes) + (0 if self.image is None else int(self.image.nbytes))


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """The embed pool's answer to an :class:`EmbedRequest`."""

    rows: np.ndarray  # float32 (tokens, D)
    max_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(self.rows.nbytes)


@dataclass(frozen=True, eq=False)
class RenderRequest:
    """Ask the VDM for one clip of ``caption``, conditioned on reference frames. ``sde=None`` samples the ODE.

    With a ``condition`` the sampler neither embeds the caption nor encodes the frames, which then only tell the size.
    """

    sample_id: str
    index: int
    caption: str
    reference_frames: np.ndarray  # uint8 (n, H, W, 3), RGB, already at the output size
    num_frames: int
    steps: int
    guidance: float  # 1.0 is off
    noise_seed: int  # initial noise; shared within a group under same_latent
    sde_seed: int = 0  # noise of the SDE steps
    sde: SdeSpec | None = None
    condition: Conditioning | None = None
    ends: bool = False  # hand the last ODE step on, as a trajectory of one step: what forward-process objectives read


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The stochastic part of one sampled path, enough to recompute its log-probability exactly; or, of an ODE, its last step.

    That step has an ``sde`` of level 0 and no log-probability; ``latents[-1]`` is then what the VAE decodes.
    """

    latents: np.ndarray  # float32 (w + 1, C, F, h, w): state before each window step, and after the last
    sigmas: np.ndarray  # float32 (steps + 1,)
    logprobs: np.ndarray  # float32 (w,) by the sampler; (0,) of an ODE
    sde: SdeSpec
    guidance: float


@dataclass(frozen=True, eq=False)
class Clip:
    """One rendered clip; ``trajectory``, and what it was conditioned on, only where a learner reads it."""

    sample_id: str
    index: int
    caption: str
    frames: np.ndarray  # uint8 (T, H, W, 3)
    weights_version: int
    trajectory: Trajectory | None = None
    condition: Conditioning | None = None


# --- rewards --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Ask the reward pool for the named ``components`` of one answer.

    ``clip`` is None only where no component needs it (a malformed completion has nothing to render).
    """

    sample_id: str
    index: int
    components: tuple[str, ...]
    text: str  # the raw completion (format reward)
    caption: str  # parsed caption, or the anchor caption in stage 2
    reference_caption: str  # ground truth caption
    target_frames: np.ndarray  # uint8 (T, H, W, 3)
    last_input_frame: np.ndarray  # uint8 (H, W, 3)
    clip: np.ndarray | None = None  # uint8 (T', H, W, 3)
    question: str = ""
    input_frames: np.ndarray | None = None  # uint8 (T'', H', W', 3), as the thinker sees them; None: no component asks


@dataclass(frozen=True, eq=False)
class GroupScoreRequest:
    """Ask the pool of a reward that judges whole groups for its value of each of the ``answers`` to one question."""

    sample_id: str
    answers: tuple[ScoreRequest, ...]


@dataclass(frozen=True)
class Scores:
    """Component name → value, unweighted. Diagnostics (motion, copy, sharpness, …) ride along under ``diagnostics``."""

    sample_id: str
    index: int
    values: dict[str, float]
    diagnostics: dict[str, float] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(
        default_factory=dict, compare=False
    )  # float32 (D,), asked for by evaluation


# --- learners -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VlmExperience:
    """One completion with its advantage, as the stage-1 learner reads it."""

    sample_id: str
    index: int
    asked: VideoQuestion
    token_ids: np.ndarray  # int32 (L,)
    rollout_logprobs: np.ndarray  # float32 (L,)
    advantage: float


@dataclass(frozen=True, eq=False)
class VdmExperience:
    """One trajectory with its advantage, as the stage-2 learner reads it.

    With a ``condition`` the learner needs neither text encoder nor VAE, and reads no frames.
    """

    sample_id: str
    index: int
    caption: str
    reference_frames: np.ndarray  # uint8 (n, H, W, 3)
    trajectory: Trajectory
    advantage: float
    condition: Conditioning | None = None

    @property
    def guidance(self) -> float:
        """The guidance that the trajectory was sampled with."""
        return self.trajectory.guidance


Experience = VlmExperience | VdmExperience


@dataclass(frozen=True, eq=False)
class Weights:
    """One published version of a policy's trained weights.

    ``lora``: PEFT state-dict names (``base_model.model.….lora_A.weight``) and ``adapter_config`` as PEFT writes it.
    ``full``: the model's own state-dict names, ``adapter_config`` empty. bf16 tensors travel as uint16 with the name in ``bf16``.
    """

    version: int
    kind: Literal["lora", "full"]
    tensors: dict[str, np.ndarray]
    adapter_config: dict[str, Any] = field(default_factory=dict)
    bf16: frozenset[str] = frozenset()
