"""What is wrong with a row's wording, found without a model. Pure functions over text, in English and Chinese."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.settings import Fraction, Positive, Section

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W_]+")
_COMMON = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "being",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "here",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "just",
        "may",
        "might",
        "of",
        "off",
        "on",
        "onto",
        "or",
        "our",
        "out",
        "over",
        "she",
        "should",
        "so",
        "some",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "up",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
        "happen",
        "happens",
        "next",
        "step",
        "after",
        "before",
        "now",
        "video",
        "clip",
    ]
)
MENTIONS = {
    "en": (
        "second clip",
        "second video",
        "next clip",
        "next video",
        "other clip",
        "target clip",
        "target video",
        "target caption",
        "following clip",
        "later clip",
        "clip 2",
        "video 2",
        "clip b",
        "ground truth",
        "the answer is",
        "reference answer",
    ),
    "zh": (
        "第二段",
        "第二个视频",
        "第二個視頻",
        "视频二",
        "视频2",
        "目标视频",
        "目标片段",
        "下一段视频",
        "下一个视频",
        "后一段",
        "另一段视频",
        "标准答案",
        "参考答案",
    ),
}
"""What gives away that a text was written by one who had seen the target."""


class Bounds(Section):
    """Thresholds of the checks. Lengths are words, of Chinese characters."""

    overlap: Fraction = 0.6
    described: Fraction = 0.7
    question: tuple[Positive, Positive] = (4, 80)
    reasoning: tuple[Positive, Positive] = (6, 250)
    caption: tuple[Positive, Positive] = (3, 120)
    other_script: Fraction = 0.3


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. ``reason`` is one of few words, ``told`` a sentence with the number and its threshold."""

    reason: str
    told: str


def units(text: str, language: str) -> list[str]:
    """Return what lengths are counted in: words, in Chinese each character of its own."""
    if language != "zh":
        return _WORD.findall(text)
    return [unit for word in _WORD.findall(text) for unit in (list(word) if _HAN.search(word) else [word])]


def content(text: str, language: str) -> set[str]:
    """Return the words of ``text`` that carry content, roughly stemmed; of Chinese its pairs of neighbouring characters."""
    if language == "zh":
        found = set()
        for run in re.findall(r"[\u3400-\u9fff]+", text):
            found |= {run[i : i + 2] for i in range(len(run) - 1)} or {run}
        return found
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in _COMMON and len(word) > 2}


def overlap(text: str, other: str, language: str) -> float:
    """Return the share in [0, 1] of the content of ``other`` that stands in ``text`` too; 0 where ``other`` has none."""
    wanted = content(other, language)
    return len(wanted & content(text, language)) / len(wanted) if wanted else 0.0


def mentioned(text: str, language: str) -> str:
    """Return the first of :data:`MENTIONS` in ``text``, of either language; empty where there is none."""
    lower = " ".join(text.lower().split())
    return next((phrase for name in (language, *MENTIONS) for phrase in MENTIONS.get(name, ()) if phrase in lower), "")


def other_script(text: str, language: str) -> float:
    """Return the share in [0, 1] of the letters of ``text`` that are not of the language's script."""
    letters = _LETTER.findall(text)
    if not letters:
        return 1.0
    han = sum(bool(_HAN.match(letter)) for letter in letters) / len(letters)
    return 1.0 - han if language == "zh" else han


def faults(
    question: str, reasoning: str, caption: str, language: str, bounds: Bounds, described: Sequence[str] = ()
) -> list[Fault]:
    """Return what is wrong with a row's wording, empty where nothing is. ``described``: what the question must not describe."""
    found: list[Fault] = []
    for name, text in (("question", question), ("reasoning", reasoning), ("caption", caption)):
        low, high = getattr(bounds, name)
        count = len(units(text, language))
        if not low <= count <= high:
            found.append(Fault("length", f"the {name} has {count} words, and {low} to {high} are right"))
        if (share := other_script(text, language)) > bounds.other_script:
            found.append(
                Fault(
                    "language",
                    f"{share:.0%} of the {name}'s letters are not {language}, more than {bounds.other_script:.0%}",
                )
            )
    if (share := overlap(question, caption, language)) > bounds.overlap:
        found.append(
            Fault(
                "gives away",
                f"{share:.0%} of the caption's content stands in the question, more than {bounds.overlap:.0%}",
            )
        )
    for text in described:
        if (share := overlap(question, text, language)) > bounds.described:
            found.append(
                Fault(
                    "describes",
                    f"{share:.0%} of a clip's content stands in the question, more than {bounds.described:.0%}",
                )
            )
    for name, text in (("question", question), ("reasoning", reasoning)):
        if phrase := mentioned(text, language):
            found.append(Fault("mentions target", f"the {name} says {phrase!r}"))
    return found


def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
