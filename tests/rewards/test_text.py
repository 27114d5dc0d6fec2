"""Format and caption agreement, against the packages that define them."""

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rewards.errors import RewardError
from rewards.format import Answer, format_reward, parse_answer
from rewards.text import comparable, reads_as_english, rouge_l, unicode_tokens
from tests.rewards.corpus import bleu

SENTENCE = "the a red blue circle squares rises rising falls slowly quickly, Then Pours water 2 pans don't"
WORDS = SENTENCE.split()


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><ans>b</ans>",
        "\n <think> a </think>\n<ans> b </ans> ",
        "<think></think><ans>b</ans>",
        "<think>a < b</think><ans>b</ans>",
    ],
)
def test_the_format_is_one_thought_and_one_answer(text: str) -> None:
    assert format_reward(text) == 1.0
    assert parse_answer(text).caption == "b"


def test_a_tag_in_capitals_is_text() -> None:
    """Tags are what the prompt asks for, letter by letter: a caption may speak of others."""
    assert parse_answer("<think>a</think><ans>press <ANS> or </THINK></ans>") == Answer("a", "press <ANS> or </THINK>")
    assert parse_answer("<think>the <Think> box</think><ans>b</ans>") == Answer("the <Think> box", "b")
    assert parse_answer("<THINK>a</THINK><ANS>b</ANS>") is None
    assert parse_answer("<think>a</think><ans>press <ans></ans>") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "<ans>b</ans>",
        "<think>a</think>",
        "<think>a</think><ans> \n</ans>",
        "<think>a</think><ans>b</ans> and more",
        "so <think>a</think><ans>b</ans>",
        "<think>a</think> hm <ans>b</ans>",
        "<think>a</think><ans>b</ans><ans>c</ans>",
        "<think>a<think></think></think><ans>b</ans>",
        "<think>a<ans>b</ans></think>",
        "<ans>b</ans><think>a</think>",
        "<think>a</think><ans>b",
    ],
)
def test_anything_else_is_not_an_answer(text: str) -> None:
    assert format_reward(text) == 0.0
    assert parse_answer(text) is None


def test_the_caption_is_folded_so_that_equal_captions_compare_equal() -> None:
    assert parse_answer("<think> x\ny </think><ans> the  red\nball </ans>") == Answer("x\ny", "the red ball")


def test_rouge_l_equals_rouge_score_with_stemming() -> None:
    rng, reference = np.random.default_rng(0), RougeScorer(["rougeL"], use_stemmer=True)
    for _ in range(200):
        a, b = (" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(2))
        assert rouge_l(a, b) == reference.score(b, a)["rougeL"].fmeasure


def test_rouge_l_by_hand() -> None:
    # LCS "the red ball" = 3 of 4 candidate and 5 reference words: F = 2·3/(4+5); "rises" and "rise" share a stem.
    assert rouge_l("the red ball rolls", "the big red ball sinks") == pytest.approx(6 / 9)
    assert rouge_l("the ball rises", "the ball rise") == 1.0
    assert rouge_l("", "the ball") == 0.0
    with pytest.raises(RewardError, match="letters or digits"):
        rouge_l("anything", "?! \U0001f408")


def test_bleu_equals_sacrebleu() -> None:
    rng = np.random.default_rng(1)
    a, b = ([" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(30)] for _ in range(2))
    found = bleu(a, b)
    assert found["bleu_4"] == pytest.approx(sacrebleu.corpus_bleu(a, [b], lowercase=True).score / 100)
    assert bleu(b, b) == pytest.approx({f"bleu_{n}": 1.0 for n in (1, 2, 3, 4)})
    # BLEU@1 by hand: clipped precision 2/3, and no brevity penalty for a longer candidate.
    assert bleu(["the the ball"], ["the ball"])["bleu_1"] == pytest.approx(2 / 3)


def test_bleu_is_blind_to_case_as_rouge_is() -> None:
    assert bleu(["The Ball ROLLS slowly Down"], ["the ball rolls slowly down"]) == pytest.approx(
        {f"bleu_{n}": 1.0 for n in (1, 2, 3, 4)}
    )
    assert rouge_l("The Ball ROLLS", "the ball rolls") == 1.0


def test_bleu_by_hand() -> None:
    """5 words against 6: 4, 2, 1 and 0 n-grams of 5, 4, 3 and 2 match; the brevity penalty is exp(1 - 6/5)."""
    found = bleu(["the red ball rolls far"], ["the red ball sinks far away"])
    penalty = np.exp(1 - 6 / 5)
    assert found["bleu_1"] == pytest.approx(penalty * 4 / 5)
    assert found["bleu_2"] == pytest.approx(penalty * (4 / 5 * 2 / 4) ** (1 / 2))
    assert found["bleu_3"] == pytest.approx(penalty * (4 / 5 * 2 / 4 * 1 / 3) ** (1 / 3))
    assert found["bleu_4"] == pytest.approx(
        penalty * (4 / 5 * 2 / 4 * 1 / 3 * 1 / (2 * 2)) ** (1 / 4)
    )  # smoothed: 1/2 of 2
    assert set(bleu(["?", ""], ["!", "a"]).values()) == {0.0}  # of nothing in common, and of no words at all


ODD = st.text(max_size=60) | st.lists(st.sampled_from([*WORDS, "ΑΣ", "İ", "\u2028", "x-y"]), max_size=90).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(ODD, st.lists(st.sampled_from(WORDS), min_size=1, max_size=90).map(" ".join))
def test_rouge_l_is_the_packages_to_the_last_bit(candidate: str, reference: str) -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert rouge_l(candidate, reference) == scorer.score(reference, candidate)["rougeL"].fmeasure
    if reads_as_english(candidate):
        assert rouge_l(reference, candidate) == scorer.score(candidate, reference)["rougeL"].fmeasure


class UnicodeTokenizer:
    """The tokens of other scripts, as ``rouge-score`` takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return unicode_tokens(text)


SCRIPTS = [
    "红色圆形上升",
    "球が上がる",
    "шар поднимается",
    "الكرة تصعد",
    "गेंद ऊपर जाती है",
    "ลูกบอลลอยขึ้น",
    "공이 올라간다",
    "η μπάλα",
    "3 cups",
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*SCRIPTS, "ball rises", "。"]), max_size=6).map(" ".join),
    st.lists(st.sampled_from(SCRIPTS[:-1]), min_size=1, max_size=6).map("".join),
)
def test_rouge_l_of_other_scripts_is_the_packages_with_these_tokens(candidate: str, reference: str) -> None:
    scorer = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
    assert rouge_l(candidate, reference) == scorer.score(reference, candidate)["rougeL"].fmeasure


def test_scripts_without_spaces_are_read_letter_by_letter_and_others_word_by_word() -> None:
    assert unicode_tokens("红色圆形，上升3次！") == [*"红色圆形上升", "3", "次"]
    assert unicode_tokens("गेंद ऊपर") == ["गेंद", "ऊपर"], "a vowel sign belongs to its word"
    assert unicode_tokens("ขึ้น") == ["ขึ้", "น"], "and where letters stand alone, to its letter"
    assert unicode_tokens("Шар поднимается, the BALLS rising") == ["шар", "поднимается", "the", "ball", "rise"]
    assert unicode_tokens("ｆｕｌｌ ３") == ["full", "3"]
    assert rouge_l("红色圆形下降", "红色圆形上升") == pytest.approx(4 / 6)
    assert rouge_l("the ball rises", "红色圆形上升") == 0.0


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_caption_of_any_script_agrees_with_itself(text: str) -> None:
    assert comparable(text) and rouge_l(text, text) == 1.0
    if len(unicode_tokens(text)) >= 4:
        assert bleu([text], [text]) == pytest.approx({f"bleu_{n}": 1.0 for n in (1, 2, 3, 4)})


def test_bleu_of_chinese_by_hand() -> None:
    """Six letters each: 5 of 6, 4 of 5, 3 of 4 and 2 of 3 n-grams match, and the lengths are equal."""
    found = bleu(["红色圆形上降"], ["红色圆形上升"])
    assert found["bleu_1"] == pytest.approx(5 / 6)
    assert found["bleu_4"] == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_accents_do_not_change_how_english_is_read() -> None:
    assert reads_as_english("Café “wet”") and not reads_as_english("кафе") and not reads_as_english("éé")
    assert rouge_l("Caf wet", "Café wet") == 1.0, "rouge-score drops letters beyond a-z"
