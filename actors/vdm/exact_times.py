"""The time of each token, handed to a transformer's time embedding as it is, and embedded no more often than it has to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ExactTimes:
    """Hands the transformer's time embedding the float32 timesteps, whatever they were cast to on the way in.

    FSDP mixed precision casts all of a forward's inputs; in bfloat16 the times 512…1000 would be rounded to multiples
    of 4, and the learner would see another sigma than the sampler.

    With ``shared``, times of single tokens are embedded once for the clip's clean tokens and once for its noisy ones,
    and the two rows are repeated afterwards: the embedding is a function of a token's time alone, and there are two.

    ``part`` says which of how many equal parts of a clip's tokens the transformer computes here (``context_parallel``).
    """

    part = (0, 1)

    def __init__(
        self, embedder: nn.Module, projection: nn.Module, shared: bool = False, two: Mapping[str, Any] | None = None
    ) -> None:
        """Hook into ``embedder``, which returns (time, projected time, …), and its ``projection``, which gets the times first.

        two: what the embedder must be called with where a clip has two times. Its first two results are (B, 2, D) or (2 B, D).
        """
        self.shared, self._two = shared, dict(two or {})
        self._value: Tensor | None = None
        self._counts: tuple[int, int] | None = None  # clean and noisy tokens, where their two times are embedded
        projection.register_forward_pre_hook(lambda _module, args: self._pick(args))
        # Functions, not methods: a deep copy of the transformer (a learner's frozen one) keeps them, and with them this.
        embedder.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, self._two_times(kwargs)), with_kwargs=True
        )
        embedder.register_forward_hook(lambda _module, _args, out: self._repeated(out))

    def _pick(self, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._value is None else (self._value,)

    def _two_times(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self._counts is None else kwargs | self._two

    def _repeated(self, out: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._counts is None:
            return out
        clean, noisy = self._counts
        time, projected, *others = out

        def repeated(rows: Tensor) -> Tensor:
            pairs = rows if rows.ndim == 3 else rows.unflatten(0, (-1, 2))
            both = [pairs[:, :1].expand(-1, clean, -1), pairs[:, 1:].expand(-1, noisy, -1)]
            each = torch.cat(both, dim=1)
            return each if rows.ndim == 3 else each.flatten(0, 1)

        return *(repeated(rows) for rows in (time, projected)), *others

    @contextmanager
    def exactly(self, times: Tensor, clean: int = 0) -> Iterator[None]:
        """Within it, the embedding sees ``times``, float32 (B,) or (B, tokens) with the ``clean`` tokens first."""
        if times.ndim == 2:
            index, parts = self.part
            length = times.shape[1] // parts
            times, clean = times[:, index * length : (index + 1) * length], min(max(clean - index * length, 0), length)
        if self.shared and times.ndim == 2:
            self._counts = (clean, times.shape[1] - clean)
            times = times[:, [0, -1]]
        self._value = times.flatten()
        try:
            yield
        finally:
            self._value = self._counts = None
