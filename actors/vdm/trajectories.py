"""Sampled trajectories as one batch of tensors, the way the learner reads them.

Responsible for stacking and padding windows, and for noising what they end in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from actors.records import Conditioning, Experience, Trajectory, VdmExperience
from actors.vdm.flow_sde import noisy_pair, rectification, shift_sigma
from actors.vdm.schedules import NoiseSchedule
from actors.vdm.text_encoder import Captions


@dataclass(frozen=True)
class Encoded:
    """What the frozen models made of one caption and its reference frames, on the policy's device."""

    text: Tensor  # (tokens, D), not padded
    negative: Tensor | None  # (tokens, D) of the negative prompt; None without guidance
    references: Tensor | None  # float32 (C, n, h, w)
    max_tokens: int
    image: Tensor | None = None  # float32 (tokens, D), where the family has an image encoder

    @classmethod
    def received(cls, record: Conditioning, device: torch.device) -> Encoded:
        """Return what travelled as ``record``."""
        text, negative, references, image = (
            None if array is None else torch.from_numpy(np.array(array)).to(device)  # Ray's arrays are read-only
            for array in (record.text, record.negative, record.references, record.image)
        )
        assert text is not None
        return cls(text, negative, references, record.max_tokens, image)

    def record(self) -> Conditioning:
        """Return the same, ready to travel."""
        text, negative, references, image = (
            None if tensor is None else tensor.float().cpu().numpy()
            for tensor in (self.text, self.negative, self.references, self.image)
        )
        return Conditioning(text, negative, references, self.max_tokens, image)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Condition:
    """What a batch's velocity is conditioned on. ``references`` None: text only; ``negative`` None: no guidance."""

    text: Captions
    references: Tensor | None  # float32 (B, C, n, h, w)
    negative: Captions | None
    guidance: Tensor  # float32 (B,)
    image: Tensor | None = None  # float32 (B, tokens, D)


@dataclass(frozen=True)
class VdmBatch:
    """Trajectories as the learner reads them; W is the longest window, shorter ones repeat their last step, masked."""

    before: Tensor  # float32 (W, B, C, F, h, w), state before each window step
    after: Tensor  # float32 (W, B, C, F, h, w), state after it
    sigmas: Tensor  # float32 (W, 2, B): sigma and next sigma
    second: Tensor  # float32 (B,): each grid's second sigma
    mask: Tensor  # bool (B, W)
    rectified: Tensor  # float32 (B, W): lambda / mean lambda of each step (flow_sde.rectification); 1 of an ODE's and of padding
    condition: Condition
    schedule: NoiseSchedule
    level: float

    @property
    def spans(self) -> Tensor:
        """sigma - next sigma of each step, float32 (B, W), > 0."""
        return (self.sigmas[:, 0] - self.sigmas[:, 1]).T


def window_parts(batch: VdmBatch, steps: int) -> list[tuple[slice, VdmBatch]]:
    """Cut ``batch`` along its window into parts of at most ``steps`` steps, each with its place among the W steps."""
    cuts = [slice(k, k + steps) for k in range(0, len(batch.before), steps)]
    return [
        (
            cut,
            replace(
                batch,
                before=batch.before[cut],
                after=batch.after[cut],
                sigmas=batch.sigmas[cut],
                mask=batch.mask[:, cut],
                rectified=batch.rectified[:, cut],
            ),
        )
        for cut in cuts
    ]


@dataclass(frozen=True)
class Noised:
    """Final latents noised anew: x_sigma = (1 - sigma) x0 + sigma eps. What forward-process objectives judge a velocity on."""

    clean: Tensor  # float32 (B, C, F, h, w)
    noise: Tensor  # float32, of the same shape
    sigma: Tensor  # float32 (B,), in (0, 1)
    noisy: Tensor  # float32, of the same shape
    condition: Condition  # without the negative branch: the velocity that is learnt is the conditional one

    @property
    def target(self) -> Tensor:
        """The velocity eps - x0 that the noising had."""
        return self.noise - self.clean


def noised(batch: VdmBatch, seeds: Sequence[int], shift: float) -> Noised:
    """Noise the final latents of ``batch``, row by row from ``seeds``, at levels uniform in time and shifted as the sampler's.

    Drawn on the CPU, so equal on every device.
    """
    clean = batch.after[-1]
    levels, rows = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        levels.append(torch.rand((), generator=generator).clamp(1e-3, 1 - 1e-3))
        rows.append(torch.randn(clean.shape[1:], generator=generator))
    sigma = shift_sigma(torch.stack(levels), shift).to(clean.device)
    noise = torch.stack(rows).to(clean.device)
    noisy, _ = noisy_pair(clean, noise, sigma)
    return Noised(clean, noise, sigma, noisy, replace(batch.condition, negative=None))


def experience(item: Experience) -> VdmExperience:
    """Return ``item``; TypeError where it is another policy's."""
    if not isinstance(item, VdmExperience):
        raise TypeError(f"the VDM learner reads VdmExperience, got {type(item).__name__}")
    return item


def collate(items: Sequence[VdmExperience], condition: Condition, device: torch.device) -> VdmBatch:
    """Stack ``items``; ValueError unless they agree in noise schedule, level and latent shape."""
    paths = [item.trajectory for item in items]
    kind = _kind(paths[0])
    for item in items:
        if _kind(item.trajectory) != kind:
            raise ValueError(
                f"{item.sample_id}[{item.index}]: a trajectory of {_kind(item.trajectory)} cannot share a batch with "
                f"one of {kind}: noise schedule, level and latent shape must agree"
            )

    def tensor(array: np.ndarray | list) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)

    # Window steps come first, so that each step's batch is contiguous, as it was in the sampler.
    longest = max(path.sde.window_size for path in paths)
    picks = [[min(k, path.sde.window_size - 1) for path in paths] for k in range(longest)]
    first = [path.sde.window_start for path in paths]
    return VdmBatch(
        before=tensor([[path.latents[j] for path, j in zip(paths, row)] for row in picks]),
        after=tensor([[path.latents[j + 1] for path, j in zip(paths, row)] for row in picks]),
        sigmas=tensor([[[p.sigmas[i + j + d] for p, i, j in zip(paths, first, row)] for d in (0, 1)] for row in picks]),
        second=tensor([path.sigmas[1] for path in paths]),
        mask=torch.tensor([[k < path.sde.window_size for k in range(longest)] for path in paths], device=device),
        rectified=torch.stack([_rectified(path, longest) for path in paths]).to(device),
        condition=condition,
        schedule=paths[0].sde.schedule,
        level=paths[0].sde.level,
    )


def _rectified(path: Trajectory, length: int) -> Tensor:
    weights = torch.ones(length)
    if path.sde.level > 0:
        grid = torch.from_numpy(np.array(path.sigmas, dtype=np.float32))  # Ray's arrays are read-only
        weights[: path.sde.window_size] = rectification(grid, path.sde)
    return weights


def _kind(path: Trajectory) -> tuple:
    return path.sde.schedule, path.sde.level, path.latents.shape[1:]
