"""Text metrics and the Fréchet distance against other implementations of the same definitions, and their laws.

ROUGE-L and BLEU are computed by ``rouge-score`` and ``sacrebleu``; so the references here are others: the definition
written down with NLTK's stemmer, and NLTK's BLEU.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import sacrebleu
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import corpus_bleu

from pipeline.evaluate.table import Answered, build_table
from rewards.frechet import frechet_distance, gaussian_frechet
from rewards.text import reads_as_english, rouge_l
from tests.rewards.corpus import bleu

WORDS = [
    "the",
    "a",
    "red",
    "Blue",
    "circles",
    "circle",
    "rises",
    "rising,",
    "rise",
    "falls",
    "slowly",
    "2",
    "pans",
    "don't",
    "über",
]
captions = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
anything = st.text(max_size=40)
readable = anything.filter(reads_as_english)

STEM = PorterStemmer()


def words(text: str) -> list[str]:
    """The reference's words: runs of a-z and 0-9, those longer than three letters stemmed."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [STEM.stem(w) if len(w) > 3 else w for w in found]


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, lengths[j] = lengths[j], before + 1 if x == y else max(lengths[j], lengths[j - 1])
    return lengths[-1]


@settings(max_examples=300, deadline=None)
@given(captions | readable, captions | readable)
def test_rouge_l_equals_its_definition_and_is_symmetric_between_0_and_1(a: str, b: str) -> None:
    common = longest_common_subsequence(words(a), words(b))
    expected = 2 * common / (len(words(a)) + len(words(b)))  # F of common/|a| and common/|b|
    assert rouge_l(a, b) == pytest.approx(expected, abs=1e-12)
    assert rouge_l(b, a) == pytest.approx(rouge_l(a, b), abs=1e-12)
    assert 0.0 <= rouge_l(a, b) <= 1.0


@settings(max_examples=100, deadline=None)
@given(anything, readable)
def test_rouge_l_is_1_for_the_reference_itself_and_blind_to_case_and_punctuation(a: str, b: str) -> None:
    assert rouge_l(b, b) == 1.0
    assert rouge_l(f"… {b.lower()}!?", b.lower()) == 1.0
    assert rouge_l(a, b) == rouge_l(f" -- {a}", b)  # whatever the candidate is, even nothing


def corpus(seed: int) -> tuple[list[str], list[str]]:
    """Candidates that keep most of their references' words, so that every n-gram order has matches.

    None is shorter than four words: NLTK counts one n-gram in a sentence that is too short to have any.
    """
    rng = np.random.default_rng(seed)
    references = [list(rng.choice(WORDS, size=rng.integers(4, 15))) for _ in range(20)]
    kept = [[w for w in r if rng.random() > 0.15] for r in references]
    candidates = [k + list(rng.choice(WORDS, size=max(4 - len(k), rng.integers(0, 3)))) for k in kept]
    return [" ".join(c) for c in candidates], [" ".join(r) for r in references]


@pytest.mark.parametrize("seed", range(4))
def test_bleu_of_every_order_equals_sacrebleu_and_nltk(seed: int) -> None:
    candidates, references = corpus(seed)
    score = sacrebleu.corpus_bleu(candidates, [references], lowercase=True)
    tokens = [[re.findall(r"[\w']+|,", t.lower()) for t in texts] for texts in (candidates, references)]
    for order, value in enumerate(bleu(candidates, references).values(), 1):
        precisions = np.array(score.precisions[:order]) / 100
        assert value == pytest.approx(score.bp * np.exp(np.log(precisions).mean()), rel=1e-9)
        assert value == pytest.approx(corpus_bleu([[r] for r in tokens[1]], tokens[0], [1 / order] * order), rel=1e-9)


def test_the_table_s_bleu_and_rouge_are_the_packages_own_on_each_kind() -> None:
    candidates, references = corpus(9)
    kinds = ["procedural", "predictive"] * 10
    answers = [
        Answered(str(i), 0, kind, c, r, {"rouge_l": rouge_l(c, r)})
        for i, (kind, c, r) in enumerate(zip(kinds, candidates, references))
    ]
    table = build_table({"system": answers}, "none")
    for start, kind in enumerate(kinds[:2]):
        own, true = candidates[start::2], references[start::2]
        figures = table.figures("system", kind)
        assert figures["bleu_4"] * 100 == pytest.approx(sacrebleu.corpus_bleu(own, [true], lowercase=True).score)
        assert figures["rouge_l"] == pytest.approx(np.mean([rouge_l(a, b) for a, b in zip(own, true)]))


def features(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Correlated features: a random mixture of ``dim`` normals, somewhere."""
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


@pytest.mark.parametrize(("n", "m", "dim"), [(80, 60, 1), (80, 60, 3), (200, 100, 16), (400, 300, 64)])
def test_frechet_equals_scipy_s_matrix_square_root_and_torchmetrics(n: int, m: int, dim: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(dim)
    x, y = features(rng, n, dim), features(rng, m, dim)
    (mx, cx), (my, cy) = ((v.mean(0), np.atleast_2d(np.cov(v, rowvar=False))) for v in (x, y))
    result = frechet_distance(x, y, "test")
    textbook = ((mx - my) ** 2).sum() + np.trace(cx + cy - 2 * np.real(scipy.linalg.sqrtm(cx @ cy)))
    assert result.value == pytest.approx(float(textbook), rel=1e-9)
    assert result.value == pytest.approx(float(_compute_fid(*map(torch.tensor, (mx, cx, my, cy)))), rel=1e-9)
    assert (result.n, result.n_truth, result.dim) == (n, m, dim)


def test_frechet_equals_the_closed_form_of_two_gaussians() -> None:
    """Covariances with common axes Q and spreads a, b: |μ − ν|² + Σ (√a − √b)². From the matrices and from samples."""
    rng = np.random.default_rng(0)
    for dim in (1, 2, 5, 32):
        q = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        a, b, mu, nu = rng.uniform(0.1, 9, dim), rng.uniform(0.1, 9, dim), rng.normal(size=dim), rng.normal(size=dim)
        closed = ((mu - nu) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        assert gaussian_frechet(mu, q * a @ q.T, nu, q * b @ q.T) == pytest.approx(closed, rel=1e-9)
    x, y = (rng.normal(size=(40_000, dim)) * np.sqrt(s) @ q.T + c for s, c in ((a, mu), (b, nu)))
    assert frechet_distance(x, y, "test").value == pytest.approx(closed, rel=0.02)
