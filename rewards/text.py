"""Agreement of captions: ROUGE-L (reward and metric) and corpus BLEU@1..4 (tables).

The numbers are those of the field's reference packages, ``rouge-score`` with stemming and ``sacrebleu``, which do the
work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from rewards.errors import RewardError

BLEU_ORDERS = (1, 2, 3, 4)


@lru_cache(maxsize=1)
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(candidate: str, reference: str) -> float:
    """Return the ROUGE-L F-measure of ``candidate`` against ``reference``, 0..1 (Lin 2004; VANS r_t1).

    An empty candidate scores 0, as in the reference package. Raises RewardError when the reference has no letter a-z or
    digit: every candidate would score 0 against it (``rouge-score`` splits on everything else, so it reads English
    only).
    """
    if not any(c.isascii() and c.isalnum() for c in reference):
        raise RewardError(f"ROUGE-L needs a reference caption with Latin letters or digits, got {reference!r}")
    return float(_rouge().score(reference, candidate)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _sentence_bleu() -> BLEU:
    # Counts do not depend on effective_order; without it the package warns that a sentence's own score is of little use.
    return BLEU(lowercase=True, effective_order=True)


def bleu_counts(candidate: str, reference: str) -> NDArray[np.int64]:
    """Return what one caption adds to corpus BLEU, (10,): its length and its reference's, matches and n-grams by order."""
    score = _sentence_bleu().sentence_score(candidate, [reference])
    return np.array([score.sys_len, score.ref_len, *score.counts, *score.totals], dtype=np.int64)


def bleu_of(counts: NDArray[np.int64], order: int) -> float:
    """Return BLEU@``order``, 0..1, of a corpus from the sum (10,) of its captions' :func:`bleu_counts`."""
    numbers = [int(number) for number in counts]
    most = max(BLEU_ORDERS)
    score = BLEU.compute_bleu(
        correct=numbers[2 : 2 + order],
        total=numbers[2 + most : 2 + most + order],
        sys_len=numbers[0],
        ref_len=numbers[1],
        smooth_method="exp",
        max_ngram_order=order,
    )
    return float(score.score) / 100.0


def bleu(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return corpus BLEU@1..4, 0..1, lower-cased, one reference each (Papineni et al. 2002, by sacrebleu).

    BLEU@n is the geometric mean of the 1..n-gram precisions times the brevity penalty, over the whole corpus: it is
    not a mean over samples. Raises RewardError for an empty corpus or unequal lengths.
    """
    if not candidates or len(candidates) != len(references):
        raise RewardError(
            f"BLEU needs as many candidates as references and at least one, got {len(candidates)} and {len(references)}"
        )
    total = np.sum([bleu_counts(c, r) for c, r in zip(candidates, references)], axis=0)
    return {f"bleu_{order}": bleu_of(total, order) for order in BLEU_ORDERS}
