"""The format of an answer, ``<think>…</think><ans>…</ans>`` unless a run says otherwise: reading it, writing it, and the reward for it.

Source: VANS (arXiv 2511.16669), r_f of stage 1. A strict format draws a text if and only if it earns the format reward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Answer:
    """What an answer says: the thought (may be empty) and the caption of the next event (never empty)."""

    thought: str
    caption: str


@dataclass(frozen=True)
class AnswerFormat:
    """Two pairs of tags. ``think`` and ``answer`` are the opening ones, in angle or square brackets; a closing one adds a slash.

    ``strict``: a text that is not well formed has no caption. Otherwise its caption is what stands in the first pair of answer
    tags, and the whole text where there is no such pair, as VANS was released. ``spaced``: :meth:`write` puts a space beside
    each tag.
    """

    think: str = "<think>"
    answer: str = "<ans>"
    strict: bool = True
    spaced: bool = True

    @property
    def tags(self) -> tuple[str, str, str, str]:
        """The four tags, in the order in which an answer has them."""
        return self.think, _closing(self.think), self.answer, _closing(self.answer)

    def parse(self, text: str) -> Answer | None:
        """Return the parts of ``text``, or None where it has no caption. White space in the caption is folded to single spaces."""
        found = self._well_formed(text)
        return found if found is not None or self.strict else self._first(text)

    def reward(self, text: str) -> float:
        """Return 1.0 where ``text`` is exactly one thought and one answer that is not empty, else 0.0: strict or not."""
        return float(self._well_formed(text) is not None)

    def write(self, thought: str, caption: str) -> str:
        """Return the well-formed answer of these two."""
        opened, thought_end, answer, answer_end = self.tags
        if self.spaced:
            return f"{opened} {thought} {thought_end} {answer} {caption} {answer_end}"
        return f"{opened}{thought}{thought_end}{answer}{caption}{answer_end}"

    def __str__(self) -> str:
        """Return the format as people read it: ``<think>…</think><ans>…</ans>``."""
        return "{}…{}{}…{}".format(*self.tags)

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tags)))

    def _well_formed(self, text: str) -> Answer | None:
        """Return the parts of ``text`` where it is exactly one thought and one answer that is not empty.

        White space around and between them is allowed; any other text there, a repeated or a nested tag is not.
        """
        tags = list(self._tag.finditer(text))
        if tuple(tag.group() for tag in tags) != self.tags:
            return None
        outside = text[: tags[0].start()] + text[tags[1].end() : tags[2].start()] + text[tags[3].end() :]
        caption = _folded(text[tags[2].end() : tags[3].start()])
        if outside.strip() or not caption:
            return None
        return Answer(text[tags[0].end() : tags[1].start()].strip(), caption)

    def _first(self, text: str) -> Answer | None:
        """Return the first thought and the first answer of ``text``; all of it is the answer where no pair of tags stands in it."""
        thought, answer = _between(text, self.think), _between(text, self.answer)
        caption = _folded(text if answer is None else answer)
        return Answer((thought or "").strip(), caption) if caption else None


DEFAULT = AnswerFormat()
"""What datasets hold in their column ``answer``, and what the bundled thinker writes."""


def parse_answer(text: str) -> Answer | None:
    """Return the parts of ``text`` in the default format, None unless it is well formed."""
    return DEFAULT.parse(text)


def format_reward(text: str) -> float:
    """Return 1.0 where :func:`parse_answer` succeeds, else 0.0."""
    return DEFAULT.reward(text)


def _closing(tag: str) -> str:
    return f"{tag[0]}/{tag[1:]}"


def _between(text: str, tag: str) -> str | None:
    _, opened, rest = text.partition(tag)
    inside, closed, _ = rest.partition(_closing(tag))
    return inside if opened and closed else None


def _folded(text: str) -> str:
    return " ".join(text.split())
