"""The artist: a diffusers pipeline of a video model that draws the next event from a caption and reference frames.

Responsible for loading, guided velocities, recomputing the log-probabilities of given trajectories (the ``Trainable`` protocol) and
the supervised loss. Sampler and learner get velocities from the one function :meth:`VdmPolicy.velocity` and steps from
``flow_sde.transition``. Not responsible for how a model is called (``family``), for weight versions on the wire or for Ray
(``worker``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.learner.adapters import fit, linear_layers
from actors.policy.lora import (
    adapter_config,
    adapters_disabled,
    inject_lora,
    load_adapter_tensors,
    peft_names,
    resolved,
    same_shape,
)
from actors.policy.protocol import PolicyOutput, SupervisedLoss, torch_dtype
from actors.policy.settings import LoraSection
from actors.records import Experience, RenderRequest, VdmExperience
from actors.vdm import flow_sde, trajectories
from actors.vdm.context_parallel import TokenSharing
from actors.vdm.files import COMPONENTS, Parts, held_bytes, load_parts, save_full
from actors.vdm.flow_sde import FlowMatchingSpec
from actors.vdm.frame_encoder import FrameEncoder
from actors.vdm.frames import video_to_frames
from actors.vdm.settings import ConditioningSection, Tiling, VdmPoolSection
from actors.vdm.supervised import flow_matching_loss
from actors.vdm.text_encoder import CaptionEmbedder, Captions, padded
from actors.vdm.trajectories import Condition, Encoded, Noised, VdmBatch
from actors.weights.files import read_folder, write_folder
from cluster.errors import CheckpointError


class VdmPolicy:
    """A text-to-video pipeline conditioned on reference frames; implements ``Trainable``.

    ``module`` is the transformer, ``family`` knows how it is called. VAE and text encoder are frozen; what they make
    of a caption or of frames is cached.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        shift: float = 3.0,
        grid: str = "diffusers",
        supervised: FlowMatchingSpec | None = None,
        reference_frames: int | None = None,
        conditioning: ConditioningSection | None = None,
        max_text_tokens: int | None = None,
        negative_prompt: str = "",
        settings: VdmPoolSection | None = None,
        tiling: Tiling | None = None,
        shared_times: bool = True,
        fps: float = 8.0,
        cache_bytes: int = 256 << 20,
    ) -> None:
        settings = settings or VdmPoolSection()
        self.device = torch.device(device)
        self.module: nn.Module = parts.transformer.to(self.device).eval()
        self.vae = parts.vae.to(self.device).eval().requires_grad_(False) if parts.vae is not None else None
        self.has_decoder = parts.has_decoder
        if tiling is not None and self.vae is not None:
            tiling.start(self.vae)
        if settings.channels_last and self.vae is not None and self.has_decoder:
            channels_last(self.vae.decoder)
        self.family = parts.blueprint.family(conditioning=conditioning, shared_times=shared_times, fps=fps)
        self.geometry, self.conditioning = self.family.geometry, self.family.conditioning
        self.image_encoder = parts.image_encoder.to(self.device) if parts.image_encoder is not None else None
        self.embedder: CaptionEmbedder | None = None
        if parts.text_encoder is not None:
            encoder = parts.text_encoder.to(self.device).eval().requires_grad_(False)
            self.embedder = CaptionEmbedder(
                encoder,
                parts.tokenizer,
                self.family.reading,
                max_text_tokens,
                cache_bytes,
                max_batch=settings.max_embed,
            )
        self.compute_dtype = dtype  # of the transformer's inputs; a learner sets the one that its FSDP computes in
        self.shift, self.grid, self.supervised = shift, grid, supervised or FlowMatchingSpec()
        self.reference_frames, self.negative_prompt = reference_frames, negative_prompt
        self.decode_batch = settings.max_decode
        self.blueprint = parts.blueprint
        self.version = 0
        self.adapter: LoraSection | None = None  # its targets are the modules' full names
        self._layers = linear_layers(parts.transformer)
        self.family.prepare(parts.transformer)
        if settings.compile_blocks:
            parts.transformer.compile_repeated_blocks()
        self.frames = FrameEncoder(self.family, parts, self.device, cache_bytes)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        lora: LoraSection | None = None,
        seed: int = 0,
        adapter: str | Path | None = None,
        device: str = "cpu",
        components: Sequence[str] = COMPONENTS,
        **options: Any,
    ) -> VdmPolicy:
        """Load a diffusers pipeline folder (or hub name) of a family that is known (``families``).

        ``adapter`` is a PEFT folder to start from; it decides rank and targets, and ``lora``, if given too, must agree. ``seed``
        draws a new one.
        ``components`` leaves out what a process does not need (a learner never decodes: no ``vae_decoder``).
        ``options`` are the constructor's: settings (how a sampler draws), shift and grid (of its sigmas), supervised (the sigmas
        of the supervised loss), reference_frames, conditioning (how it sees the input), max_text_tokens, negative_prompt,
        tiling (large frames go through the VAE in overlapping tiles), shared_times (embed a clip's two times once, not for
        each token), fps (of the clips), cache_bytes. Without LoRA all of the transformer's weights are trainable.
        """
        kind = torch_dtype(dtype)
        policy = cls(load_parts(path, kind, components), dtype=kind, device=device, **options)
        if adapter is not None:
            policy.add_adapter(adapter, lora)
        elif lora is not None:
            policy.inject(lora, seed)
        return policy

    # --- adapter ---

    def inject(self, spec: LoraSection, seed: int = 0) -> None:
        """Put a fresh adapter, drawn from ``seed``, into the transformer; everything else is frozen."""
        inject_lora(self.module, spec, self.family.lora_targets, seed)
        self.adapter = resolved(spec, self._layers, self.family.lora_targets)

    def add_adapter(self, folder: str | Path, spec: LoraSection | None = None) -> None:
        """Put the PEFT adapter of ``folder`` into the transformer; ``spec``, where given, must have its shape."""
        config, tensors = read_folder(folder)
        foreign = sorted(name for name in tensors if "text_encoder" in name.split("."))
        if foreign:
            raise CheckpointError(
                f"the adapter in {folder} has {len(foreign)} tensors for the text encoder ({foreign[0]}), which is frozen "
                "and whose embeddings are shared by samplers and learners; merge them into the model folder's "
                "text_encoder, or train an adapter of the transformer alone"
            )
        saved = self.put_adapter(tensors, config, str(folder))
        if spec is not None and not same_shape(saved, resolved(spec, self._layers, self.family.lora_targets)):
            raise CheckpointError(
                f"the adapter in {folder} has rank {saved.rank}, alpha {saved.alpha:g} and {len(saved.targets or ())} modules, but "
                f"the configuration asks for {spec}; set them equal"
            )

    def put_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> LoraSection:
        """Put an adapter with PEFT's names and configuration into the transformer, and return its shape.

        ``where`` it is from begins the message of a CheckpointError: it does not fit the transformer, or another one of
        another shape has been put in before.
        """
        fitted = fit(tensors, config, self._layers, "vdm", where)
        if self.adapter is None:
            self.inject(fitted.spec)
        elif not same_shape(self.adapter, fitted.spec):
            raise CheckpointError(f"{where}: the adapter {fitted.spec} does not fit the injected one {self.adapter}")
        self.load_adapter_state(fitted.apply(tensors))
        return fitted.spec

    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy PEFT-named tensors into the injected adapter; CheckpointError where they do not fit."""
        load_adapter_tensors(self.module, tensors)

    def adapter_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the adapter under PEFT names, from ``state`` (the module's gathered state dict) or the module."""
        return peft_names(self.module.state_dict() if state is None else state)

    def reference(self) -> AbstractContextManager[None]:
        """Within it, the adapter is off: the base model. ValueError without LoRA (the learner keeps a frozen copy)."""
        return adapters_disabled(self.module)

    def export(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained weights: a PEFT folder that diffusers reads too; without LoRA a pipeline folder."""
        if self.adapter is not None:
            config = adapter_config(self.module)
            write_folder(folder, config, self.adapter_state(state), diffusers=self.blueprint.pipeline)
            return
        encoder = self.embedder.encoder if self.embedder is not None and self.embedder.trained else None
        save_full(self.blueprint, folder, self.module, state, encoder)

    @property
    def fsdp_units(self) -> list[nn.Module]:
        """The transformer blocks."""
        return self.family.units(self.module)

    @property
    def frozen_parts(self) -> list[nn.Module]:
        """The models beside ``module``: VAE, text encoder and image encoder, as far as they were loaded."""
        encoder = self.embedder.encoder if self.embedder is not None else None
        images = self.image_encoder.model if self.image_encoder is not None else None
        return [part for part in (self.vae, encoder, images) if part is not None]

    # --- conditions ---

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Return caption embeddings (B, L, D), zero behind each caption's end."""
        return self._require_embedder()(captions).rows

    def _require_embedder(self) -> CaptionEmbedder:
        if self.embedder is None:
            raise CheckpointError(
                "captions cannot be embedded: the policy was loaded without the component 'text_encoder', and they came "
                "without their embeddings"
            )
        return self.embedder

    def encode_references(self, frames: np.ndarray, num_frames: int | None = None) -> Tensor:
        """Return the latents (C, n', h, w) of reference frames uint8 (n, H, W, 3), as ``conditioning`` makes them.

        num_frames: of the answer, which families need whose condition is as long as the clip.
        """
        return self.frames.references(frames, num_frames)

    def encode(self, caption: str, references: np.ndarray, guidance: float, num_frames: int | None = None) -> Encoded:
        """Return what the frozen models make of one caption (its embedding, the negative prompt's where ``guidance`` is
        not 1) and of its reference frames uint8 (n, H, W, 3): what a process without them has to be sent.

        num_frames: of the answer, as of :meth:`encode_references`.
        """
        embedder = self._require_embedder()
        return Encoded(
            text=embedder.row(caption),
            negative=embedder.row(self.negative_prompt) if guidance != 1.0 else None,
            references=self.encode_references(references, num_frames) if len(references) else None,
            max_tokens=embedder.max_tokens,
            image=self.frames.image(references) if len(references) else None,
        )

    def join(self, items: Sequence[Encoded], guidance: Sequence[float]) -> Condition:
        """Return ``items`` as the condition of one batch; guidance 1 in all rows leaves the negative branch out."""
        length = items[0].max_tokens
        negative = None
        if any(scale != 1.0 for scale in guidance):
            # Of a row without guidance the branch is computed and weighs 0, so its text may be anything.
            rows = [item.text if item.negative is None else item.negative for item in items]
            negative = padded(rows, length)
        return Condition(
            text=padded([item.text for item in items], length),
            references=_stacked([item.references for item in items]),
            negative=negative,
            guidance=torch.tensor(guidance, dtype=torch.float32, device=self.device),
            image=_stacked([item.image for item in items]),
        )

    def counters(self) -> dict[str, float]:
        """Return what the frozen models made, and how often it was asked for, since the start."""
        made, asked = self.embedder.counters() if self.embedder is not None else (0, 0)
        return {
            "captions": float(made),
            "captions_asked": float(asked),
            **self.frames.counters(),
        }

    def held(self) -> dict[str, int]:
        """Return the bytes of the parameters that this process holds, by component; sharded ones count their shard."""
        encoder = self.embedder.encoder if self.embedder is not None else None
        halves = {} if self.vae is None else {"vae_encoder": self.vae.encoder, "vae_decoder": self.vae.decoder}
        images = self.image_encoder.model if self.image_encoder is not None else None
        parts = {"transformer": self.module, "text_encoder": encoder, "image_encoder": images, **halves}
        return {name: held_bytes(part) for name, part in parts.items() if part is not None}

    def condition(
        self,
        captions: Sequence[str],
        references: Sequence[np.ndarray],
        guidance: Sequence[float],
        num_frames: int | None = None,
    ) -> Condition:
        """Return the condition of a batch; guidance 1 in all rows leaves the negative branch out.

        num_frames: of the answers, as of :meth:`encode_references`.
        """
        embedder, latents, image = self._require_embedder(), None, None
        if len(references[0]):
            latents = torch.stack([self.encode_references(frames, num_frames) for frames in references])
            image = _stacked([self.frames.image(frames) for frames in references])
        negative = None
        if any(scale != 1.0 for scale in guidance):
            negative = embedder([self.negative_prompt] * len(captions))
        scales = torch.tensor(guidance, dtype=torch.float32, device=self.device)
        return Condition(embedder(captions), latents, negative, scales, image)

    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Return v of the target latents x (B, C, F, h, w) at sigma (B,), guided, float32.

        Guidance: v = v_negative + g (v_caption - v_negative); both branches see the same reference frames.
        """

        def run(text: Captions) -> Tensor:
            references, image = condition.references, condition.image
            return self.family.velocity(self.module, x, sigma, text, references, self.compute_dtype, image)

        v = run(condition.text)
        if condition.negative is not None:
            base = run(condition.negative)
            v = base + condition.guidance.view(-1, 1, 1, 1, 1) * (v - base)
        return v

    def encoded(self, items: Sequence[RenderRequest | VdmExperience]) -> list[Encoded]:
        """Return what ``items`` are conditioned on: what came with them, or what this process makes."""
        if self.embedder is not None:
            self.embedder.embed([item.caption for item in items if item.condition is None])
        return [
            self.encode(item.caption, item.reference_frames, item.guidance, self._num_frames(item))
            if item.condition is None
            else Encoded.received(item.condition, self.device)
            for item in items
        ]

    def _num_frames(self, item: RenderRequest | VdmExperience) -> int:
        if isinstance(item, RenderRequest):
            return item.num_frames
        return self.geometry.frames(item.trajectory.latents.shape[2])

    # --- learning ---

    def share_tokens(
        self, count: int, modules: Sequence[nn.Module], sharing: TokenSharing | None = None
    ) -> TokenSharing:
        """Let ``count`` neighbouring ranks share the tokens of a clip: see ``TokenSharing.share``. Returns their groups.

        Collective where these groups are to be made; ``sharing`` are those of an earlier call.
        """
        sharing = sharing or TokenSharing(count, self.device.type)
        sharing.share(modules)
        self.family.times.part = sharing.part, sharing.count
        return sharing

    def collate(self, items: Sequence[Experience]) -> VdmBatch:
        """Return trajectories as one batch; they must agree in noise schedule, level and sizes."""
        vdm = [trajectories.experience(item) for item in items]
        condition = self.join(self.encoded(vdm), [item.guidance for item in vdm])
        return trajectories.collate(vdm, condition, self.device)

    def split(self, batch: VdmBatch, steps: int) -> list[tuple[slice, VdmBatch]]:
        """Cut ``batch`` into parts of at most ``steps`` window steps: each is a forward and backward of its own."""
        return trajectories.window_parts(batch, steps)

    def forward(self, batch: VdmBatch) -> PolicyOutput:
        """Return the log-probability, mean and std of every window step: (B, W), (B, W, C, F, h, w), (B, W), float32.

        One call of the transformer per window step, on the batch as the sampler had it: with the same batch, weights
        and dtype the result equals the sampler's bit for bit.
        """
        logprobs, means, stds = [], [], []
        for before, after, (sigma, following) in zip(batch.before, batch.after, batch.sigmas):
            v = self.velocity(before, sigma, batch.condition)
            step = flow_sde.transition(before, v, sigma, following, batch.second, batch.schedule, batch.level)
            logprobs.append(flow_sde.step_logprob(after, step))
            means.append(step.mean)
            stds.append(step.std)
        logp = torch.stack(logprobs, dim=1)
        return PolicyOutput(
            logprobs=torch.where(batch.mask, logp, torch.zeros_like(logp)),
            mask=batch.mask,
            mean=torch.stack(means, dim=1),
            std=torch.stack(stds, dim=1),
        )

    def noised(self, batch: VdmBatch, seeds: Sequence[int]) -> Noised:
        """Return the clips of ``batch`` (of requests with ``ends``) noised anew, each at a level and with noise of its own seed."""
        return trajectories.noised(batch, seeds, self.shift)

    def kl(self, out: PolicyOutput, ref: PolicyOutput, estimator: str | None = None) -> Tensor:
        """Return KL(current || reference) per window step (B, W), in closed form, 0 where masked.

        ValueError for another ``estimator`` than ``closed``: both steps are Gaussians of the same std, whose KL is known.
        """
        if estimator not in (None, "closed"):
            raise ValueError(f"kl_estimator={estimator!r} is for tokens; the flow's KL has a closed form: use 'closed'")
        assert out.mean is not None and ref.mean is not None and out.std is not None
        value = flow_sde.kl_gaussian(out.mean, ref.mean, out.std, batch_dims=2)
        return torch.where(out.mask, value, torch.zeros_like(value))

    def rollout_logprobs(self, items: Sequence[Experience]) -> Tensor:
        """Return the sampler's log-probabilities (B, W), 0 in the padding."""
        rows = [torch.from_numpy(np.array(trajectories.experience(item).trajectory.logprobs)) for item in items]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)

    def sft_loss(
        self,
        batch: Sequence[tuple[np.ndarray, str, np.ndarray]],
        *,
        generator: torch.Generator | None = None,
        spec: FlowMatchingSpec | None = None,
    ) -> SupervisedLoss:
        """Return ``supervised.flow_matching_loss`` of (reference frames, caption, target frames) rows.

        ``spec`` None is the policy's ``supervised``.
        """
        return flow_matching_loss(self, batch, generator, spec or self.supervised)

    def drop_text_encoder(self) -> None:
        """Free the text encoder's memory; captions that were embedded stay known."""
        if self.embedder is not None:
            self.embedder.drop_encoder()

    def train_text_encoder(self, enabled: bool = True) -> nn.Module:
        """Let ``sft_loss`` train the text encoder too (from-scratch pretraining); returns it for the optimizer."""
        if self.embedder is None or self.embedder.encoder is None:
            raise CheckpointError("the policy was loaded without the component 'text_encoder'")
        self.embedder.train(enabled)
        return self.embedder.encoder

    def encode_targets(self, targets: Sequence[np.ndarray], references: Sequence[np.ndarray] = ()) -> Tensor:
        """Return the latents (B, C, F, h, w) of answers uint8 (T, H, W, 3), as ``FrameEncoder.targets`` makes them."""
        return self.frames.targets(targets, references)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Return the answers uint8 (B, T, H, W, 3) of final latents (B, C, F, h, w), so many at once as the VAE may decode."""
        if not self.has_decoder:
            raise CheckpointError("clips cannot be decoded: the policy was loaded without the component 'vae_decoder'")
        videos = (self.family.decode(self.vae, part) for part in latents.split(self.decode_batch))
        return np.concatenate([video_to_frames(video[:, :, self.geometry.given :]) for video in videos])


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows as one batch; None where the first is."""
    return None if rows[0] is None else torch.stack([row for row in rows if row is not None])


def channels_last(module: nn.Module) -> None:
    """Keep the weights of the convolutions of ``module`` with channels last; what they give is the same up to float noise."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
