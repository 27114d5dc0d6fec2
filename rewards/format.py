"""The answer format ``<think>…</think><ans>…</ans>``: parsing it, and the reward for keeping it.

Source: VANS (arXiv 2511.16669), r_f of stage 1. One parser serves the reward and the caption that is rendered, so
that a text is drawn if and only if it earns the format reward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"</?(?:think|ans)>")
_TAGS_IN_ORDER = ["<think>", "</think>", "<ans>", "</ans>"]


@dataclass(frozen=True)
class Answer:
    """A well-formed answer: the thought (may be empty) and the caption of the next event (never empty)."""

    thought: str
    caption: str


def parse_answer(text: str) -> Answer | None:
    """Return the parts of ``text``, or None unless it is exactly one think block and one non-empty ans block.

    White space around and between the blocks is allowed; any other text there, a repeated or a nested tag is not.
    White space inside the caption is folded to single spaces, so that equal captions compare equal.
    """
    tags = list(_TAG.finditer(text))
    if [tag.group() for tag in tags] != _TAGS_IN_ORDER:
        return None
    outside = text[: tags[0].start()] + text[tags[1].end() : tags[2].start()] + text[tags[3].end() :]
    caption = " ".join(text[tags[2].end() : tags[3].start()].split())
    if outside.strip() or not caption:
        return None
    return Answer(text[tags[0].end() : tags[1].start()].strip(), caption)


def format_reward(text: str) -> float:
    """Return 1.0 where :func:`parse_answer` succeeds, else 0.0."""
    return float(parse_answer(text) is not None)
