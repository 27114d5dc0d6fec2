"""Captions as an artist's transformer reads them: embeddings of a T5-like encoder, zero behind the caption's end.

A transformer without a text mask needs zeros there, as diffusers' pipelines make them; one with a mask does not see them. Each
caption is encoded alone, unless a batch is allowed: alone, its embedding does not depend on what it was batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actors.policy.cache import Cache
from cluster.errors import CheckpointError


@dataclass(frozen=True)
class CaptionReading:
    """How a family's text encoder reads a caption."""

    max_tokens: int  # that the transformer was trained with; captions beyond it are truncated
    clean: Callable[[str], str] = str  # of the caption's text, before it is tokenized
    padded: bool = False
    """Whether the encoder is given the padding up to ``max_tokens`` too, without a mask, and so lets it change the caption's rows."""


class Captions(NamedTuple):
    """Embedded captions of a batch."""

    rows: Tensor  # (B, L, D), zero behind each caption's end
    mask: Tensor  # bool (B, L), True on a caption's tokens


class CaptionEmbedder:
    """Embeds captions with a frozen text encoder, cached per caption for as long as the encoder's weights stay.

    ``encoder`` None: embeddings come from ``stored`` (caption → (tokens, D)) alone.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        reading: CaptionReading,
        max_tokens: int | None = None,
        cache_bytes: int = 256 << 20,
        stored: Callable[[str], Tensor] | None = None,
        max_batch: int = 1,
    ) -> None:
        self.encoder, self.tokenizer, self.reading, self.max_batch = encoder, tokenizer, reading, max_batch
        self.max_tokens = max_tokens or min(reading.max_tokens, int(tokenizer.model_max_length))
        self.trained = False
        self._stored = stored
        self._cache: Cache[Tensor] = Cache(cache_bytes)

    def train(self, enabled: bool) -> None:
        """Let gradients reach the encoder (joint pretraining); nothing is cached meanwhile."""
        self.trained = enabled
        self._cache.clear()
        self.encoder.requires_grad_(enabled)

    def __call__(self, captions: Sequence[str]) -> Captions:
        """Return the batch with L = ``max_tokens``; captions beyond as many tokens are truncated, as diffusers' pipelines do."""
        if self.trained:
            return self._encode_batch([self.reading.clean(caption) for caption in captions])
        return padded([self.row(caption) for caption in captions], self.max_tokens)

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> None:
        """Make the embeddings of those ``captions`` that are not held, ``max_batch`` at once; 1 leaves it to :meth:`row`."""
        if self.max_batch == 1 or self.trained or self.encoder is None:
            return
        new = [caption for caption in dict.fromkeys(captions) if not self._cache.holds(caption)]
        for start in range(0, len(new), self.max_batch):
            part = new[start : start + self.max_batch]
            states, lengths = self._states([self.reading.clean(caption) for caption in part])
            for caption, state, length in zip(part, states, lengths):
                self._cache.get(caption, state[:length].clone)

    @torch.no_grad()
    def row(self, caption: str) -> Tensor:
        """Return the embedding (tokens, D) of one caption, made once."""
        if self.trained:
            return self._encode(caption)
        return self._cache.get(caption, lambda: self._encode(caption))

    def drop_encoder(self) -> None:
        """Let the encoder go; only captions that are in the cache can be asked for from now on."""
        self.encoder = None

    def counters(self) -> tuple[int, int]:
        """Return how many captions were embedded, and how often an embedding was asked for."""
        return self._cache.misses, self._cache.misses + self._cache.hits

    def _encode(self, caption: str) -> Tensor:
        """Return (tokens, D) of one caption."""
        if self.encoder is None:
            if self._stored is None:
                raise CheckpointError(f"caption {caption[:80]!r} cannot be embedded: the text encoder has been let go")
            return self._stored(caption)
        if self.reading.padded:
            states, (length,) = self._states([self.reading.clean(caption)])
            return states[0, :length].clone()
        text = self.reading.clean(caption)
        tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return self.encoder(tokens.input_ids.to(self.encoder.device)).last_hidden_state[0].clone()

    def _encode_batch(self, captions: list[str]) -> Captions:
        states, lengths = self._states(captions)
        rows = torch.nn.functional.pad(states, (0, 0, 0, self.max_tokens - states.shape[1]))
        return Captions(rows, _mask(lengths, rows))

    def _states(self, captions: list[str]) -> tuple[Tensor, list[int]]:
        """Return (B, longest, D), zero behind each caption's end, and how many tokens each has."""
        tokens = self.tokenizer(
            captions,
            padding="max_length" if self.reading.padded else "longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            return_attention_mask=True,
        ).to(self.encoder.device)
        seen = None if self.reading.padded else tokens.attention_mask
        states = self.encoder(tokens.input_ids, seen).last_hidden_state
        states = states * tokens.attention_mask[..., None].to(states.dtype)
        return states, tokens.attention_mask.sum(dim=1).tolist()


def padded(rows: Sequence[Tensor], max_tokens: int) -> Captions:
    """Return embeddings (tokens, D) of any length as one batch with L = ``max_tokens``."""
    out = rows[0].new_zeros(len(rows), max_tokens, rows[0].shape[-1])
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return Captions(out, _mask([len(row) for row in rows], out))


def _mask(lengths: Sequence[int], rows: Tensor) -> Tensor:
    ends = torch.tensor(lengths, device=rows.device)
    return torch.arange(rows.shape[1], device=rows.device) < ends[:, None]
