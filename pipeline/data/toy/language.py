"""The toy world's language: concepts, their wordings in English and Chinese, captions, and what the artist can draw.

Responsible for words only: no pixels, no scenes, no randomness of its own (generators are passed in).

Every concept (a colour, a shape, a verb) has three wordings in each language. The artist (VDM) is pretrained on the first two,
CLIP on all three, so a right caption with a third wording cannot be drawn: the paper's semantic-to-visual gap (arXiv 2511.16669,
sec. 1). Ground-truth captions prefer one *head* wording per concept. Six of the seventeen heads are undrawable, a third, as of
all wordings: a thinker that learns to speak as the ground truth does says neither more nor less that can be drawn than before.

Chinese is written without spaces, as it is; each of its wordings is one word of the CLIP and artist tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from rewards.format import DEFAULT

Wordings = dict[str, tuple[str, str, str]]
LanguageCode = Literal["en", "zh"]
STATES = ("", "large", "small", "faint", "pale", "top left", "top right", "bottom left", "bottom right")
"""What can be said of an object that a picture shows; the first is that it is there."""


@dataclass(frozen=True)
class Language:
    """One language's words. ``colours``, ``shapes`` and ``verbs`` map a concept's key to its three wordings.

    ``questions`` maps what is asked to two wordings; ``{name}`` is an object in first wordings. ``plain`` is an event as thoughts
    use it; ``caption`` is an event as captions tell it; ``optional`` may be left out of a caption. ``thought`` joins the ``shown``
    events, by ``joint``, with the one that is ``told``. ``seen`` tells an object that a picture shows, in one of the ``states``
    or in none.
    """

    colours: Wordings
    shapes: Wordings
    verbs: Wordings
    questions: dict[str, tuple[str, str]]
    name: str
    plain: str
    caption: str
    optional: str
    thought: str
    joint: str
    states: dict[str, str]
    seen: str

    @property
    def concepts(self) -> tuple[tuple[str, Wordings], ...]:
        """The slots of a caption in order, each with its wordings."""
        return ("colour", self.colours), ("shape", self.shapes), ("verb", self.verbs)

    @cached_property
    def lookup(self) -> dict[str, dict[str, tuple[str, int]]]:
        """For each slot, the concept and the number of every wording."""
        return {
            slot: {w: (key, i) for key, ws in table.items() for i, w in enumerate(ws)} for slot, table in self.concepts
        }

    @cached_property
    def grammar(self) -> re.Pattern[str]:
        """What captions match, one group a slot."""
        slots = {slot: f"(?P<{slot}>{'|'.join(longest_first(self.lookup[slot]))})" for slot, _ in self.concepts}
        pattern = self.caption.format(**slots)
        return re.compile(pattern.replace(self.optional, f"(?:{self.optional})?", 1))


def longest_first(words: Iterable[str]) -> list[str]:
    """``words`` as alternatives of a regular expression: none stands before one that begins with it."""
    return sorted(words, key=lambda word: (-len(word), word))


ENGLISH = Language(
    colours={
        "red": ("red", "scarlet", "crimson"),
        "green": ("green", "emerald", "jade"),
        "blue": ("blue", "azure", "cobalt"),
        "yellow": ("yellow", "golden", "amber"),
        "purple": ("purple", "violet", "mauve"),
        "cyan": ("cyan", "turquoise", "teal"),
    },
    shapes={
        "circle": ("circle", "disc", "ball"),
        "square": ("square", "box", "block"),
        "triangle": ("triangle", "wedge", "pyramid"),
    },
    verbs={
        "rise": ("rises", "climbs", "ascends"),
        "fall": ("falls", "sinks", "drops"),
        "left": ("moves left", "slides left", "heads west"),
        "right": ("moves right", "slides right", "heads east"),
        "grow": ("grows", "expands", "swells"),
        "shrink": ("shrinks", "contracts", "dwindles"),
        "fade": ("fades", "vanishes", "dissolves"),
        "whiten": ("whitens", "brightens", "pales"),
    },
    questions={
        "next": ("what is the next step ?", "which step follows in this recipe ?"),
        "again": ("what happens if it is done again ?", "what if the same thing happens again ?"),
        "reversed": ("what if it were reversed ?", "what if it goes the other way ?"),
        "instead": ("what if the {name} does it instead ?", "what if it is done by the {name} ?"),
        "opposite": ("what if the {name} does the opposite ?", "what if the {name} did the reverse ?"),
    },
    name="{colour} {shape}",
    plain="{colour} {shape} {verb}",
    caption="the {colour} {shape} {verb}",
    optional="the ",
    thought="{shown} so {told}",
    joint=" then ",
    states={state: state for state in STATES},
    seen="the {state} {colour} {shape} ",
)
CHINESE = Language(
    colours={
        "red": ("红色", "赤色", "朱红"),
        "green": ("绿色", "翠绿", "碧绿"),
        "blue": ("蓝色", "天蓝", "湛蓝"),
        "yellow": ("黄色", "金黄", "琥珀"),
        "purple": ("紫色", "紫罗兰", "淡紫"),
        "cyan": ("青色", "青绿", "湖青"),
    },
    shapes={
        "circle": ("圆形", "圆盘", "圆球"),
        "square": ("方形", "方块", "方砖"),
        "triangle": ("三角形", "楔形", "金字塔"),
    },
    verbs={
        "rise": ("上升", "升起", "攀升"),
        "fall": ("下降", "落下", "坠落"),
        "left": ("向左移动", "向左滑动", "往西走"),
        "right": ("向右移动", "向右滑动", "往东走"),
        "grow": ("变大", "扩大", "膨胀"),
        "shrink": ("变小", "缩小", "收缩"),
        "fade": ("消失", "淡出", "消散"),
        "whiten": ("变白", "变亮", "发白"),
    },
    questions={
        "next": ("下一步是什么？", "接下来是哪一步？"),
        "again": ("再做一次会怎样？", "如果同样的事再发生一次呢？"),
        "reversed": ("如果反过来呢？", "如果朝相反的方向呢？"),
        "instead": ("如果换成{name}来做呢？", "如果由{name}来做会怎样？"),
        "opposite": ("如果{name}做相反的事呢？", "如果{name}反着做会怎样？"),
    },
    name="{colour}{shape}",
    plain="{colour}{shape}{verb}",
    caption="{colour}的{shape}{verb}",
    optional="的",
    thought="{shown}，所以{told}",
    joint="，然后",
    states={
        "": "",
        "large": "巨大",
        "small": "微小",
        "faint": "暗淡",
        "pale": "苍白",
        "top left": "左上方",
        "top right": "右上方",
        "bottom left": "左下方",
        "bottom right": "右下方",
    },
    seen="{state}{colour}{shape}",
)
LANGUAGES: dict[LanguageCode, Language] = {"en": ENGLISH, "zh": CHINESE}

SPOKEN = (*LANGUAGES, "mixed")
"""What a dataset can speak; in a ``mixed`` one every fourth block of four samples is Chinese."""

COLOURS, SHAPES, VERBS = tuple(ENGLISH.colours), tuple(ENGLISH.shapes), tuple(ENGLISH.verbs)
"""The concepts' keys."""

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

UNSEEN_WORDING = 2
"""The one that it does not use."""

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


@dataclass(frozen=True)
class Event:
    """One object (named by colour and shape, unique in its scene) does one thing. All fields are concept keys."""

    colour: str
    shape: str
    verb: str

    def plain(self, language: LanguageCode = "en") -> str:
        """The event in first wordings without an article, as thoughts use it: ``red circle rises``."""
        spoken = LANGUAGES[language]
        return spoken.plain.format(**_worded(spoken, self, (0, 0, 0)))

    def name(self, language: LanguageCode = "en") -> str:
        """The object in first wordings, as questions use it: ``red circle``."""
        spoken = LANGUAGES[language]
        return spoken.name.format(**_worded(spoken, self, (0, 0, 0)))


def _worded(language: Language, event: Event, wordings: tuple[int, int, int]) -> dict[str, str]:
    return {slot: table[getattr(event, slot)][i] for (slot, table), i in zip(language.concepts, wordings, strict=True)}


def _match(text: str) -> tuple[LanguageCode, re.Match[str]] | None:
    said = " ".join(text.lower().rstrip(" .。").split())
    for code, language in LANGUAGES.items():
        found = language.grammar.fullmatch(said)
        if found is not None:
            return code, found
    return None


def language_in(text: str) -> LanguageCode | None:
    """The language whose grammar has the caption, or ``None``."""
    match = _match(text)
    return None if match is None else match[0]


def parse_caption(text: str) -> Event | None:
    """The event a caption names in any wording of either language, or ``None`` when it is not a sentence of a grammar."""
    match = _match(text)
    if match is None:
        return None
    lookup, found = LANGUAGES[match[0]].lookup, match[1]
    return Event(**{slot: words[found[slot]][0] for slot, words in lookup.items()})


def drawable(text: str) -> bool:
    """Whether the caption parses and all its words are within the artist's vocabulary."""
    match = _match(text)
    if match is None:
        return False
    lookup, found = LANGUAGES[match[0]].lookup, match[1]
    return all(words[found[slot]][1] < DRAWN_WORDINGS for slot, words in lookup.items())


def caption_with(event: Event, wordings: tuple[int, int, int], language: LanguageCode = "en") -> str:
    """The caption for an event with wording indices for (colour, shape, verb)."""
    spoken = LANGUAGES[language]
    return spoken.caption.format(**_worded(spoken, event, wordings))


def reworded(caption: str, wording: int) -> str:
    """The caption with all its concepts in wording number ``wording``; one that is not a sentence of a grammar is left as it is."""
    match, event = _match(caption), parse_caption(caption)
    return caption if match is None or event is None else caption_with(event, (wording,) * 3, match[0])


def head_caption(event: Event, rng: np.random.Generator, language: LanguageCode = "en", wordings: int = 3) -> str:
    """A ground-truth caption: every concept in its head wording with probability ``HEAD_SHARE``.

    ``wordings``: how many of them are used, the first ones; a head that is not among them gives way to one that is.
    """

    def pick(concept: str) -> int:
        head = HEAD_WORDING[concept] % wordings
        return head if rng.random() < HEAD_SHARE else int(rng.choice([i for i in range(wordings) if i != head]))

    return caption_with(event, (pick(event.colour), pick(event.shape), pick(event.verb)), language)


def uniform_caption(event: Event, rng: np.random.Generator, wordings: int = 3, language: LanguageCode = "en") -> str:
    """A caption whose concepts use each of the first ``wordings`` wordings equally often."""
    colour, shape, verb = (int(i) for i in rng.integers(wordings, size=3))
    return caption_with(event, (colour, shape, verb), language)


def thought_of(shown: tuple[Event, ...], told: Event, language: LanguageCode = "en") -> str:
    """The reasoning of an answer: what was shown, and what is told to come of it."""
    spoken = LANGUAGES[language]
    return spoken.thought.format(shown=spoken.joint.join(e.plain(language) for e in shown), told=told.plain(language))


def caption_words(language: LanguageCode) -> list[str]:
    """All words that captions and sights of a language can hold, sorted. A Chinese wording is one word."""
    spoken = LANGUAGES[language]
    wordings = [wording for _, table in spoken.concepts for ws in table.values() for wording in ws]
    return sorted({w for text in [spoken.optional, *wordings, *spoken.states.values()] for w in text.split()})


def sight(things: list[tuple[str, str, str]], rng: np.random.Generator, language: LanguageCode = "en") -> str:
    """What a picture shows, in any wordings: ``the large red disc the azure block``. ``things`` are (colour, shape, state)."""
    spoken = LANGUAGES[language]
    told = [
        spoken.seen.format(
            state=spoken.states[state],
            colour=spoken.colours[colour][int(rng.integers(3))],
            shape=spoken.shapes[shape][int(rng.integers(3))],
        )
        for colour, shape, state in things
    ]
    return " ".join("".join(told).split())


def grammar_corpus(language: LanguageCode) -> list[str]:
    """Texts that hold every word of a language's answers and questions: the VLM tokenizer's training text.

    English comes as sentences. Chinese comes as words and phrases: a byte-pair tokenizer takes what stands between spaces for
    one word, and would learn whole sentences by heart.
    """
    spoken = LANGUAGES[language]
    events = [Event(colour, shape, verb) for colour in COLOURS for shape in SHAPES for verb in VERBS]
    if language == "zh":
        pieces = [w for _, table in spoken.concepts for ws in table.values() for w in ws]
        pieces += [spoken.optional, spoken.joint, *spoken.thought.format(shown=" ", told="").split()]
        pieces += [part for pair in spoken.questions.values() for question in pair for part in question.split("{name}")]
        return [piece for piece in pieces if piece] * 8
    lines = [
        DEFAULT.write(thought_of((event, event), event), caption_with(event, (i, i, i)))
        for event in events
        for i in range(3)
    ]
    names = dict.fromkeys(event.name() for event in events)
    return lines + [q.format(name=name) for name in names for pair in spoken.questions.values() for q in pair]
