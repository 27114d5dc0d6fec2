"""BLEU of a corpus as the evaluation's table makes it: counts summed over captions, then one value an order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.text import BLEU_ORDERS, bleu_counts, bleu_of


def bleu(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return BLEU@1..4, 0..1, with one reference for each candidate."""
    total = np.sum([bleu_counts(c, r) for c, r in zip(candidates, references, strict=True)], axis=0)
    return {f"bleu_{order}": bleu_of(total, order) for order in BLEU_ORDERS}
