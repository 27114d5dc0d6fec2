"""What a family of video models owes a plan, from its configurations alone: geometry, operations, bytes.

Responsible for how pixels, latents and tokens relate, which the policy reads too. Not responsible for weights or tensors
(``family``). No torch, so that a plan takes milliseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from actors.failures import BadSampleError
from actors.flops import Flops, attention, dense
from actors.vdm.settings import ConditioningSection
from cluster.errors import CheckpointError

if TYPE_CHECKING:
    from actors.vdm.families import Blueprint


@dataclass(frozen=True)
class Geometry:
    """How pixels, latents and tokens relate in one pipeline."""

    channels: int  # latent channels C
    spatial: int  # pixels per latent cell, VAE
    temporal: int  # frames per latent frame after the first, VAE
    patch: tuple[int, int, int]  # latent cells per token (t, h, w), transformer
    chunk: int  # frames after the first come in multiples of it, or the VAE would drop some
    rope_max: int | None = None  # most tokens along any axis; None: no limit
    given: int = 0
    """Frames of the input that a drawn clip begins with. Latents hold them; they are no part of the answer, and are cut when it is
    decoded."""

    def cells(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, F, h, w) of an answer's latents, those of the given frames included, unchecked: a plan's arithmetic."""
        frames = (num_frames + self.given - 1) // self.temporal + 1
        return self.channels, frames, height // self.spatial, width // self.spatial

    def frames(self, latent_frames: int) -> int:
        """Return the frames of the answer that ``latent_frames`` decode to."""
        return (latent_frames - 1) * self.temporal + 1 - self.given

    def latent_shape(self, num_frames: int, height: int, width: int, references: int) -> tuple[int, int, int, int]:
        """Return (C, F, h, w) of a clip; BadSampleError names what does not fit and the nearest size that does."""
        total = num_frames + self.given
        if num_frames < 1 or (total - 1) % self.chunk:
            low = max(total - 1, 0) // self.chunk * self.chunk + 1 - self.given
            fitting = [str(n) for n in (low, low + self.chunk) if n >= 1]
            given = f", the first {self.given} of them the input's," if self.given else ""
            raise BadSampleError(
                f"num_frames={num_frames}: this model's causal VAE takes {self.chunk}k+1 frames{given} and would drop the rest "
                f"silently; use {' or '.join(fitting)}"
            )
        for name, size, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            unit = self.spatial * patch
            if size < unit or size % unit:
                low = max(size // unit, 1) * unit
                raise BadSampleError(
                    f"{name}={size} is not a multiple of {unit} ({self.spatial} pixels per latent x patch {patch}); "
                    f"use {low} or {low + unit}"
                )
        shape = self.cells(num_frames, height, width)
        frames = shape[1] + references
        if frames % self.patch[0]:
            raise BadSampleError(
                f"{references} reference + {shape[1]} target latent frames are not a multiple of patch {self.patch[0]}"
            )
        tokens = (frames // self.patch[0], shape[2] // self.patch[1], shape[3] // self.patch[2])
        if self.rope_max is not None and max(tokens) > self.rope_max:
            raise BadSampleError(
                f"{num_frames} frames of {height}x{width} with {references} reference frames make {tokens} "
                f"(time, height, width) tokens; this transformer's position embedding ends at {self.rope_max} "
                "(rope_max_seq_len): use fewer or smaller frames"
            )
        return shape


@dataclass(frozen=True)
class VdmTokens:
    """Tokens of one clip in the transformer: reference latents first, then the clip; captions are padded to ``text``."""

    reference: int
    target: int
    text: int
    one_time: bool = False
    """Whether reference tokens carry the target's time."""

    @property
    def total(self) -> int:
        """Length of the self-attended sequence."""
        return self.reference + self.target

    @property
    def times(self) -> bool:
        """Whether each token has a time of its own."""
        return self.reference > 0 and not self.one_time


class Shapes(ABC):
    """One pipeline's numbers. Construction refuses a pipeline that this project cannot train, with the reason."""

    tile: ClassVar[int]
    """Side in pixels of what the VAE works on at once under ``video.vae_tiling``."""

    def __init__(self, blueprint: Blueprint) -> None:
        """Read the configurations of ``blueprint``. CheckpointError says what of the pipeline cannot be done here."""
        self.blueprint = blueprint
        self.transformer: Mapping[str, Any] = blueprint.parts.get("transformer", {})
        self.vae: Mapping[str, Any] = blueprint.parts.get("vae", {})
        self.text_encoder: Mapping[str, Any] = blueprint.parts.get("text_encoder", {})
        self.image_encoder: Mapping[str, Any] = blueprint.parts.get("image_encoder", {})
        reason = self.refusal()
        if reason is not None:
            raise CheckpointError(f"{blueprint.where}: {reason}")

    @abstractmethod
    def refusal(self) -> str | None:
        """Return why this pipeline of the family cannot be used here; None: it can."""

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """How pixels, latents and tokens relate."""

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """Tokens that every caption is padded to."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the transformer."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Width inside a block's MLP."""

    @property
    def layers(self) -> int:
        """Blocks of the transformer."""
        return int(self.transformer["num_layers"])

    def reference_latents(self, conditioning: ConditioningSection, frames: int) -> int:
        """Return how many latent frames stand before the target's where a clip is conditioned on ``frames`` frames.

        BadSampleError names the key where the model cannot be conditioned so.
        """
        return conditioning.latents(frames)

    def tokens(self, num_frames: int, height: int, width: int, references: int, *, one_time: bool = False) -> VdmTokens:
        """Return the tokens of a clip with ``references`` reference latents of its size; ``one_time``: theirs is the target's."""
        _, frames, rows, columns = self.geometry.cells(num_frames, height, width)
        t, h, w = self.geometry.patch
        per_frame = (rows // h) * (columns // w)
        return VdmTokens(references // t * per_frame, frames // t * per_frame, self.text_tokens, one_time=one_time)

    @abstractmethod
    def transformer_flops(self, tokens: VdmTokens) -> Flops:
        """Return one forward of one clip (double it under guidance).

        Where reference tokens have a time of their own, the time embedding is computed for each token.
        """

    def text_encoder_flops(self, tokens: int) -> Flops:
        """Return one caption of ``tokens`` tokens, encoded alone and unpadded, as the embedder does: a T5 encoder's."""
        return t5_flops(self.text_encoder, tokens)

    @abstractmethod
    def encode_flops(self, num_frames: int, height: int, width: int) -> Flops:
        """Return the VAE's encoding of one clip; reference frames are clips of one frame each."""

    def condition_flops(
        self, conditioning: ConditioningSection, frames: int, num_frames: int, height: int, width: int
    ) -> Flops:
        """Return the encoding of what a clip of ``num_frames`` is conditioned on: ``frames`` frames, each alone, or a clip as long."""
        if conditioning.references == "clip":
            return self.encode_flops(num_frames, height, width)
        return self.encode_flops(1, height, width) * frames

    @abstractmethod
    def decode_flops(self, num_frames: int, height: int, width: int) -> Flops:
        """Return the VAE's decoding of one clip."""

    def lora_parameters(self, rank: int) -> int:
        """Return the size of an adapter on a block's two attentions and its MLP, in all blocks."""
        return self.layers * rank * (8 * 2 * self.width + 2 * (self.width + self.hidden))

    @abstractmethod
    def block_bytes(self, tokens: int, text: int, element: int, lora: bool) -> float:
        """Return what autograd keeps of one block for ``tokens`` tokens and ``text`` caption tokens.

        element: bytes of the compute dtype. lora: only an adapter is trained.
        """

    @abstractmethod
    def sampling_bytes(self, tokens: VdmTokens, element: int) -> float:
        """Return the bytes of the largest moment of one transformer call on one clip, without gradients."""

    @abstractmethod
    def decoding_bytes(self, num_frames: int, height: int, width: int) -> float:
        """Return the bytes of the largest moment of decoding one clip, in float32."""

    @abstractmethod
    def encoding_bytes(self, num_frames: int, height: int, width: int, references: int) -> float:
        """Return the bytes of the largest moment of encoding ``references`` frames, each alone, or at 0 a clip of ``num_frames``."""


def t5_flops(config: Mapping[str, Any], tokens: int) -> Flops:
    """Return the operations of a T5 or UMT5 encoder on ``tokens`` tokens."""
    d, inner = int(config["d_model"]), int(config["num_heads"]) * int(config["d_kv"])
    gated = str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated")
    per_layer = dense(tokens, d, inner) * 4 + dense(tokens, d, int(config["d_ff"])) * (3 if gated else 2)
    layers = int(config["num_layers"])
    return Flops(layers * per_layer, layers * attention(tokens, tokens, inner))
