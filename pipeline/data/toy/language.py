"""The toy world's language: concepts, their wordings, captions, and what the artist can draw.

Responsible for words only: no pixels, no scenes, no randomness of its own (generators are passed in).

Every concept (a colour, a shape, a verb) has three wordings. The artist (VDM) is pretrained on the first two, CLIP on all
three, so a right caption with a third wording cannot be drawn: the paper's semantic-to-visual gap (arXiv 2511.16669, sec. 1).
Ground-truth captions prefer one *head* wording per concept. Six of the seventeen heads are undrawable, a third, as of all
wordings: a thinker that learns to speak as the ground truth does says neither more nor less that can be drawn than before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[str, str, str]] = {
    "red": ("red", "scarlet", "crimson"),
    "green": ("green", "emerald", "jade"),
    "blue": ("blue", "azure", "cobalt"),
    "yellow": ("yellow", "golden", "amber"),
    "purple": ("purple", "violet", "mauve"),
    "cyan": ("cyan", "turquoise", "teal"),
}
SHAPES: dict[str, tuple[str, str, str]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"),
}
VERBS: dict[str, tuple[str, str, str]] = {
    "rise": ("rises", "climbs", "ascends"),
    "fall": ("falls", "sinks", "drops"),
    "left": ("moves left", "slides left", "heads west"),
    "right": ("moves right", "slides right", "heads east"),
    "grow": ("grows", "expands", "swells"),
    "shrink": ("shrinks", "contracts", "dwindles"),
    "fade": ("fades", "vanishes", "dissolves"),
    "whiten": ("whitens", "brightens", "pales"),
}
OPPOSITE: dict[str, str] = {
    "rise": "fall",
    "fall": "rise",
    "left": "right",
    "right": "left",
    "grow": "shrink",
    "shrink": "grow",
    "fade": "whiten",
    "whiten": "fade",
}
DRAWN_WORDINGS = 2
"""The artist's pretraining uses wordings 0 .. DRAWN_WORDINGS-1 of every concept."""

HEAD_SHARE = 0.7
"""Share of ground-truth captions that use a concept's head wording; the rest is split evenly over the other two."""

HEAD_WORDING: dict[str, int] = {
    "red": 0,
    "green": 2,
    "blue": 1,
    "yellow": 1,
    "purple": 0,
    "cyan": 2,
    "circle": 1,
    "square": 2,
    "triangle": 0,
    "rise": 0,
    "fall": 2,
    "left": 1,
    "right": 2,
    "grow": 1,
    "shrink": 0,
    "fade": 1,
    "whiten": 2,
}

QUESTIONS: dict[str, tuple[str, str]] = {
    "next": ("what is the next step ?", "which step follows in this recipe ?"),
    "again": ("what happens if it is done again ?", "what if the same thing happens again ?"),
    "reversed": ("what if it were reversed ?", "what if it goes the other way ?"),
    "instead": ("what if the {name} does it instead ?", "what if it is done by the {name} ?"),
    "opposite": ("what if the {name} does the opposite ?", "what if the {name} did the reverse ?"),
}
"""Wordings of the questions; ``{name}`` is an object in first wordings (``red circle``)."""


@dataclass(frozen=True)
class Event:
    """One object (named by colour and shape, unique in its scene) does one thing. All fields are concept keys."""

    colour: str
    shape: str
    verb: str

    def plain(self) -> str:
        """The event in first wordings without an article, as thoughts use it: ``red circle rises``."""
        return f"{COLOURS[self.colour][0]} {SHAPES[self.shape][0]} {VERBS[self.verb][0]}"


_CONCEPTS: tuple[tuple[str, dict[str, tuple[str, str, str]]], ...] = (
    ("colour", COLOURS),
    ("shape", SHAPES),
    ("verb", VERBS),
)
_LOOKUP = {slot: {w: (key, i) for key, ws in table.items() for i, w in enumerate(ws)} for slot, table in _CONCEPTS}
_CAPTION = re.compile(
    r"(?:the )?"
    + " ".join(f"(?P<{slot}>{'|'.join(sorted(_LOOKUP[slot], key=len, reverse=True))})" for slot, _ in _CONCEPTS)
)


def _match(text: str) -> re.Match[str] | None:
    return _CAPTION.fullmatch(" ".join(text.lower().rstrip(" .").split()))


def parse_caption(text: str) -> Event | None:
    """The event a caption names in any wording, or ``None`` when it is not a sentence of the grammar."""
    found = _match(text)
    if found is None:
        return None
    return Event(**{slot: _LOOKUP[slot][found[slot]][0] for slot, _ in _CONCEPTS})


def drawable(text: str) -> bool:
    """Whether the caption parses and all its words are within the artist's vocabulary."""
    found = _match(text)
    return found is not None and all(_LOOKUP[slot][found[slot]][1] < DRAWN_WORDINGS for slot, _ in _CONCEPTS)


def caption_with(event: Event, wordings: tuple[int, int, int]) -> str:
    """The caption for an event with wording indices for (colour, shape, verb)."""
    colour, shape, verb = wordings
    return f"the {COLOURS[event.colour][colour]} {SHAPES[event.shape][shape]} {VERBS[event.verb][verb]}"


def head_caption(event: Event, rng: np.random.Generator) -> str:
    """A ground-truth caption: every concept in its head wording with probability ``HEAD_SHARE``."""

    def pick(concept: str) -> int:
        head = HEAD_WORDING[concept]
        return head if rng.random() < HEAD_SHARE else int(rng.choice([i for i in range(3) if i != head]))

    return caption_with(event, (pick(event.colour), pick(event.shape), pick(event.verb)))


def uniform_caption(event: Event, rng: np.random.Generator, wordings: int = 3) -> str:
    """A caption whose concepts use each of the first ``wordings`` wordings equally often."""
    colour, shape, verb = (int(i) for i in rng.integers(wordings, size=3))
    return caption_with(event, (colour, shape, verb))


def caption_words() -> list[str]:
    """All words captions can hold, sorted: the vocabulary of the CLIP and artist tokenizers."""
    words = {"the"}
    for table in (COLOURS, SHAPES, VERBS):
        for wordings in table.values():
            words.update(word for phrase in wordings for word in phrase.split())
    return sorted(words)


def grammar_corpus() -> list[str]:
    """Sentences that hold every word of answers and questions: the VLM tokenizer's training text."""
    lines = []
    for colour in COLOURS:
        for shape in SHAPES:
            for verb in VERBS:
                event = Event(colour, shape, verb)
                for i in range(3):
                    plain = event.plain()
                    lines.append(
                        f"<think> {plain} then {plain} so {plain} </think> <ans> {caption_with(event, (i, i, i))} </ans>"
                    )
            name = f"{COLOURS[colour][0]} {SHAPES[shape][0]}"
            lines.extend(question.format(name=name) for pair in QUESTIONS.values() for question in pair)
    return lines
