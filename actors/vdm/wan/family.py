"""How Wan's transformer reads a clip, the time of each token, and where an adapter goes.

Reference latents stand before the target's along time, and no parameter is new (arXiv 2511.16669, section on the VDM). Their
tokens carry timestep 0, or the target's (``ConditioningSection.time``): then a clip has one time, the model's ordinary input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actors.failures import BadSampleError
from actors.vdm.flow_sde import NUM_TRAIN_TIMESTEPS

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Layers of each block that an adapter is put into by default."""


def token_timesteps(sigma: Tensor, references: int, shape: Sequence[int], patch: tuple[int, int, int]) -> Tensor:
    """Return the transformer's timesteps: 1000 sigma on target tokens, 0 on those of the ``references`` leading
    latent frames.

    sigma: (B,) float32; shape: (C, F, h, w) of the target. Without references the result is (B,), the model's
    ordinary input; with them (B, tokens), time slowest as the patch embedding flattens.
    """
    times = sigma * NUM_TRAIN_TIMESTEPS
    if not references:
        return times
    if references % patch[0]:
        raise BadSampleError(f"{references} reference frames do not fill temporal patches of {patch[0]} latent frames")
    per_frame = (shape[2] // patch[1]) * (shape[3] // patch[2])
    clean = times.new_zeros(len(times), references // patch[0] * per_frame)
    noisy = times[:, None].expand(-1, shape[1] // patch[0] * per_frame)
    return torch.cat([clean, noisy], dim=1)


class ExactTimes:
    """Hands the transformer's time embedding the float32 timesteps, whatever they were cast to on the way in.

    FSDP mixed precision casts all of a forward's inputs; in bfloat16 the times 512…1000 would be rounded to multiples
    of 4, and the learner would see another sigma than the sampler.

    With ``shared``, times of single tokens are embedded once for the clip's clean tokens and once for its noisy ones,
    and the two rows are repeated afterwards: the embedding is a function of a token's time alone, and there are two.
    """

    def __init__(self, transformer: Any, shared: bool = False) -> None:
        self.shared = shared
        self._value: Tensor | None = None
        self._counts: tuple[int, int] | None = None  # clean and noisy tokens, where their two times are embedded
        embedder = transformer.condition_embedder
        embedder.timesteps_proj.register_forward_pre_hook(lambda _module, args: self._pick(args))
        # Functions, not methods: a deep copy of the transformer (a learner's frozen one) keeps them, and with them this.
        embedder.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, self._two_times(kwargs)), with_kwargs=True
        )
        embedder.register_forward_hook(lambda _module, _args, out: self._repeated(out))

    def _pick(self, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._value is None else (self._value,)

    def _two_times(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self._counts is None else kwargs | {"timestep_seq_len": 2}

    def _repeated(self, out: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._counts is None:
            return out
        clean, noisy = self._counts
        time, projected, *others = out
        return *(
            torch.cat([rows[:, :1].expand(-1, clean, -1), rows[:, 1:].expand(-1, noisy, -1)], dim=1)
            for rows in (time, projected)
        ), *others

    @contextmanager
    def exactly(self, times: Tensor, clean: int = 0) -> Iterator[None]:
        """Within it, the embedding sees ``times``, float32 (B,) or (B, tokens) with the ``clean`` tokens first."""
        if self.shared and times.ndim == 2 and 0 < clean < times.shape[1]:
            self._counts = (clean, times.shape[1] - clean)
            times = times[:, [0, clean]]
        self._value = times.flatten()
        try:
            yield
        finally:
            self._value = self._counts = None
