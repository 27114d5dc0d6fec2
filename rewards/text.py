"""Agreement of captions: ROUGE-L (reward and metric) and corpus BLEU@1..4 (tables).

The numbers are those of the field's reference packages: ``rouge-score`` with stemming, whose tokens are taken and whose longest
common subsequence is counted here in words of bits, many times faster and to the last bit the same; and ``sacrebleu``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU

from rewards.errors import RewardError

BLEU_ORDERS = (1, 2, 3, 4)


_TOKENIZER = DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=65536)
def _tokens_of_word(word: str) -> tuple[str, ...]:
    # The tokenizer splits at everything but a-z and 0-9, white space among it: word by word it gives the same.
    return tuple(_TOKENIZER.tokenize(word))


def _tokens(text: str) -> list[str]:
    return [token for word in text.split() for token in _tokens_of_word(word)]


@lru_cache(maxsize=4096)
def _positions(reference: str) -> tuple[dict[str, int], int]:
    """Return where each token of ``reference`` stands, as set bits, and how many there are: the same for a whole group."""
    if not any(c.isascii() and c.isalnum() for c in reference):
        raise RewardError(f"ROUGE-L needs a reference caption with Latin letters or digits, got {reference!r}")
    where: dict[str, int] = {}
    tokens = _tokens(reference)
    for place, token in enumerate(tokens):
        where[token] = where.get(token, 0) | 1 << place
    return where, len(tokens)


def rouge_l(candidate: str, reference: str) -> float:
    """Return the ROUGE-L F-measure of ``candidate`` against ``reference``, 0..1 (Lin 2004; VANS r_t1).

    An empty candidate scores 0, as in the reference package. Raises RewardError when the reference has no letter a-z or
    digit: every candidate would score 0 against it (``rouge-score`` splits on everything else, so it reads English
    only). The subsequence is counted bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    where, length = _positions(reference)
    tokens = _tokens(candidate)
    if not tokens or not length:
        return 0.0
    everywhere = (1 << length) - 1
    unmatched = everywhere
    for token in tokens:
        met = unmatched & where.get(token, 0)
        unmatched = (unmatched + met | unmatched - met) & everywhere
    matches = length - unmatched.bit_count()
    precision, recall = matches / len(tokens), matches / length
    return 2 * precision * recall / (precision + recall) if matches else 0.0


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
