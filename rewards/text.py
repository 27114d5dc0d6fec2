"""Agreement of captions: ROUGE-L (reward and metric) and corpus BLEU@1..4 (tables), in any script.

The numbers are those of the field's reference packages: ``rouge-score``, whose longest common subsequence is counted here in words
of bits, many times faster and to the last bit the same; and ``sacrebleu``.

The reference caption decides how both texts are cut into tokens. English, and whatever is written in Latin letters, is read as
``rouge-score`` reads it, with stemming: a-z and 0-9 and nothing else. A reference with letters of another script is read by
:func:`unicode_tokens`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

from rewards.errors import RewardError

BLEU_ORDERS = (1, 2, 3, 4)

_WITHOUT_SPACES = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Myanmar, Khmer
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B)),  # radicals, marks and numerals of Han
    *((0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),  # kana, bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),  # Han
)
"""Blocks of scripts that put no space between words, first and last code point."""


@cache
def _tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer  # brings nltk and scikit-learn, which take seconds to load

    return DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=65536)
def _tokens_of_word(word: str) -> tuple[str, ...]:
    # The tokenizer splits at everything but a-z and 0-9, white space among it: word by word it gives the same.
    return tuple(_tokenizer().tokenize(word))


def _english_tokens(text: str) -> list[str]:
    return [token for word in text.split() for token in _tokens_of_word(word)]


def unicode_tokens(text: str) -> list[str]:
    """Return the tokens of ``text`` in any script: compatibility forms made equal (NFKC), without case.

    A letter of a script without spaces (Chinese, Japanese, Thai …) is a token, with the marks that follow it. Elsewhere a run of
    letters, digits and marks is one; a run of a-z and 0-9 is stemmed as English is.
    """
    return [token for word in _runs(text) for token in (_tokens_of_word(word) if word.isascii() else (word,))]


def _runs(text: str) -> Iterator[str]:
    run = ""
    alone = False  # whether ``run`` is a letter that takes marks and nothing else
    for char in unicodedata.normalize("NFKC", text).casefold():
        if run and unicodedata.category(char).startswith("M"):
            run += char
            continue
        single = any(first <= ord(char) <= last for first, last in _WITHOUT_SPACES)
        if run and (alone or single or not char.isalnum()):
            yield run
            run = ""
        if char.isalnum():
            run, alone = run + char, single
    if run:
        yield run


@lru_cache(maxsize=65536)
def _foreign(char: str) -> bool:
    if char < "\u0250" or not char.isalpha():  # the Latin blocks, with signs such as the ordinal and the micro sign
        return False
    return not any(unicodedata.name(c, "").startswith("LATIN ") for c in unicodedata.normalize("NFKC", char))


@lru_cache(maxsize=4096)
def reads_as_english(reference: str) -> bool:
    """Return whether texts are compared as ``rouge-score`` compares English: a reference in Latin letters or digits."""
    return any(c.isascii() and c.isalnum() for c in reference) and not any(map(_foreign, reference))


def comparable(text: str) -> bool:
    """Return whether ``text`` has a letter or digit, of any script: without one nothing agrees with it."""
    return any(char.isalnum() for char in text)


def tokens_of(text: str, reference: str) -> list[str]:
    """Return the tokens of ``text`` as they are compared with those of ``reference``."""
    return _english_tokens(text) if reads_as_english(reference) else unicode_tokens(text)


@lru_cache(maxsize=4096)
def _positions(reference: str) -> tuple[dict[str, int], int]:
    """Return where each token of ``reference`` stands, as set bits, and how many there are: the same for a whole group."""
    if not comparable(reference):
        raise RewardError(f"ROUGE-L needs a reference caption with letters or digits, got {reference!r}")
    where: dict[str, int] = {}
    tokens = tokens_of(reference, reference)
    for place, token in enumerate(tokens):
        where[token] = where.get(token, 0) | 1 << place
    return where, len(tokens)


def rouge_l(candidate: str, reference: str) -> float:
    """Return the ROUGE-L F-measure of ``candidate`` against ``reference``, 0..1 (Lin 2004; VANS r_t1).

    An empty candidate scores 0, as in the reference package. Raises RewardError when the reference has no letter and no digit:
    every candidate would score 0 against it. The subsequence is counted bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited").
    """
    where, length = _positions(reference)
    tokens = tokens_of(candidate, reference)
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


@lru_cache(maxsize=2)
def _sentence_bleu(tokenize: str) -> BLEU:
    # Counts do not depend on effective_order; without it the package warns that a sentence's own score is of little use.
    return BLEU(lowercase=True, effective_order=True, tokenize=tokenize)


def bleu_counts(candidate: str, reference: str) -> NDArray[np.int64]:
    """Return what one caption adds to corpus BLEU, (10,): its length and its reference's, matches and n-grams by order."""
    if reads_as_english(reference):
        score = _sentence_bleu("13a").sentence_score(candidate, [reference])
    else:
        texts = [" ".join(unicode_tokens(text)) for text in (candidate, reference)]
        score = _sentence_bleu("none").sentence_score(texts[0], texts[1:])
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
