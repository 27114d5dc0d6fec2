"""Agreement of captions: ROUGE-L (reward and metric) and corpus BLEU@1..4 (tables).

The numbers are those of the field's reference packages, ``rouge-score`` with stemming and ``sacrebleu``, which do the
work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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


def bleu(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return corpus BLEU@1..4, 0..1, lower-cased, one reference each (Papineni et al. 2002, by sacrebleu).

    BLEU@n is the geometric mean of the 1..n-gram precisions times the brevity penalty, over the whole corpus: it is
    not a mean over samples. Raises RewardError for an empty corpus or unequal lengths.
    """
    if not candidates or len(candidates) != len(references):
        raise RewardError(
            f"BLEU needs as many candidates as references and at least one, got {len(candidates)} and {len(references)}"
        )
    return {
        f"bleu_{order}": float(
            BLEU(lowercase=True, max_ngram_order=order).corpus_score(list(candidates), [list(references)]).score
        )
        / 100.0
        for order in BLEU_ORDERS
    }
