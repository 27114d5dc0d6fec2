"""The toy world's samples: a real VNEP problem small enough for two CPU cores.

Responsible for drawing questions, answers and clips from seeds, and for judging whether a clip shows the right event.
Not responsible for files (``shards``), pictures (``scene``) or words (``language``).

Procedural samples: the input clip shows two steps of a recipe. Its rule, to be learnt from examples: objects take turns,
and each turn does the opposite of the one before. The next step therefore belongs to the object that has not moved yet
(three objects) or to the first one again (two objects).
Predictive samples: the input clip shows one event, a what-if question changes it; the same clip is asked two questions.

Splits never share a scene (its set of coloured shapes), hence no (scene, event) combination either.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np

from actors.records import VideoQuestion
from rewards.format import DEFAULT

from .language import (
    COLOURS,
    DRAWN_WORDINGS,
    LANGUAGES,
    OPPOSITE,
    SHAPES,
    VERBS,
    Event,
    LanguageCode,
    head_caption,
    parse_caption,
    thought_of,
    uniform_caption,
)
from .scene import BACKGROUNDS, FPS, SLOTS, Scene, Thing, all_events, render, render_there_and_back

SPLITS = ("train", "val", "test", "sft", "artist")
"""``train`` (RL), ``val`` (choosing), ``test`` (reporting), ``sft`` (the VLM's SFT), ``artist`` (the VDM's SFT)."""

SFT_WRONG_EVENTS = 0.3
"""Share of ``sft`` answers that name a wrong event: the label noise that RL has to overcome."""

ARTIST_MISMATCHED = 0.22
"""Share of ``artist`` rows whose target clip does not show the caption, as in web-scale video captions."""

_SHARED_COLOUR, _SHARED_SHAPE = 0.5, 0.2
_KIND_BLOCK = 4


@dataclass(frozen=True)
class ToySample:
    """One row. Clips are uint8 (9, 32, 32, 3); ``scene`` and ``event`` are the truth, ``noisy`` marks SFT noise."""

    id: str
    kind: str
    question: str
    caption: str
    thought: str
    input_frames: np.ndarray
    target_frames: np.ndarray
    scene: Scene
    event: Event
    noisy: bool = False
    language: LanguageCode = "en"

    @property
    def asked(self) -> VideoQuestion:
        """What the VLM is asked."""
        return VideoQuestion(self.question, self.input_frames, FPS)

    @property
    def answer_text(self) -> str:
        """The text the VLM is trained to write."""
        return DEFAULT.write(self.thought, self.caption)

    @property
    def meta_json(self) -> str:
        """Scene and true event as JSON: all that ``follow`` needs, stored in the Parquet row."""
        things = [[t.colour, t.shape, t.x, t.y] for t in self.scene.things]
        event = [self.event.colour, self.event.shape, self.event.verb]
        return json.dumps(
            {
                "world": "toy",
                "language": self.language,
                "background": self.scene.background,
                "things": things,
                "event": event,
                "noisy": self.noisy,
            }
        )


def read_meta(meta_json: str) -> tuple[Scene, Event]:
    """Scene and true event from a row's ``meta``. Raises ValueError when it is not the toy world's."""
    try:
        meta = json.loads(meta_json)
        scene = Scene(meta["background"], tuple(Thing(c, s, float(x), float(y)) for c, s, x, y in meta["things"]))
        return scene, Event(*meta["event"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"meta is not a toy-world record ({error!r}): {meta_json[:120]!r}") from error


def split_of(scene: Scene) -> str:
    """Which of ``train`` / ``val`` / ``test`` owns a scene: a fixed hash of its objects, 60 / 20 / 20."""
    digest = hashlib.sha256(repr(scene.key()).encode()).digest()
    share = digest[0] % 5
    return "train" if share < 3 else ("val" if share == 3 else "test")


def draw_scene(rng: np.random.Generator, owner: str) -> Scene:
    """A random scene that belongs to ``train``, ``val`` or ``test``. Objects often share a colour, sometimes a shape."""
    while True:
        scene = _draw_any_scene(rng)
        if split_of(scene) == owner:
            return scene


def _draw_any_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(2, 4))
    style = rng.random()
    names: list[tuple[str, str]] = []
    colour, shape = str(rng.choice(COLOURS)), str(rng.choice(SHAPES))
    while len(names) < count:
        c = colour if style < _SHARED_COLOUR else str(rng.choice(COLOURS))
        s = shape if _SHARED_COLOUR <= style < _SHARED_COLOUR + _SHARED_SHAPE else str(rng.choice(SHAPES))
        if (c, s) not in names:
            names.append((c, s))
    slots = rng.permutation(len(SLOTS))[:count]
    things = []
    for (c, s), slot in zip(names, slots, strict=True):
        x, y = SLOTS[slot]
        things.append(Thing(c, s, x, y))
    return Scene(str(rng.choice(list(BACKGROUNDS))), tuple(things))


def _event(thing: Thing, verb: str) -> Event:
    return Event(thing.colour, thing.shape, verb)


@dataclass(frozen=True)
class _Story:
    shown: tuple[Event, ...]
    question: str
    answer: Event


def _procedural(rng: np.random.Generator, scene: Scene, language: LanguageCode) -> _Story:
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    verb = str(rng.choice(VERBS))
    question = str(rng.choice(LANGUAGES[language].questions["next"]))
    shown = (_event(order[0], verb), _event(order[1], OPPOSITE[verb]))
    return _Story(shown, question, _event(order[2] if len(order) == 3 else order[0], verb))


def _predictive(rng: np.random.Generator, scene: Scene, language: LanguageCode, branch: int) -> _Story:
    """``branch`` 0 or 1 picks the question; the clip is drawn from ``rng`` before the branch matters."""
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    verb = str(rng.choice(VERBS))
    first, other = order[0], order[1]
    stories = [
        ("again", _event(first, verb)),
        ("reversed", _event(first, OPPOSITE[verb])),
        ("instead", _event(other, verb)),
        ("opposite", _event(other, OPPOSITE[verb])),
    ]
    asked, answer = stories[rng.permutation(len(stories))[branch]]
    question = str(rng.choice(LANGUAGES[language].questions[asked])).format(name=_event(other, verb).name(language))
    return _Story((_event(first, verb),), question, answer)


def _stream(seed: int, *path: object) -> np.random.Generator:
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def possible_outcomes(scene: Scene) -> list[Event]:
    """Every event that can happen in the scene: 8 verbs for each object."""
    return all_events(scene)


def language_of(index: int, spoken: str) -> LanguageCode:
    """The language of sample ``index`` in a dataset that speaks ``spoken``, one of ``SPOKEN``. Samples of one clip share it."""
    if spoken == "mixed":
        spoken = "zh" if index // _KIND_BLOCK % 4 == 3 else "en"
    return next(code for code in LANGUAGES if code == spoken)


def make_sample(
    index: int,
    split: str,
    seed: int = 0,
    language: LanguageCode = "en",
    background: str | None = None,
    *,
    drawable: bool = False,
) -> ToySample:
    """Sample ``index`` of a split: a pure function of its arguments. Languages share scenes, events and clips; ``background`` stands
    behind them in place of the scene's own. With ``drawable``, true captions have no word that the artist cannot draw.

    Of four consecutive samples two are procedural; the other two are predictive and share one input clip, with two
    questions and two futures. ``sft`` captions use all wordings evenly and name a wrong event in 30% of the rows;
    ``artist`` captions use drawable wordings only and 22% of the target clips show another event or none.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the toy world has {', '.join(SPLITS)}")
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; the toy world speaks {', '.join(LANGUAGES)}")
    block, place = divmod(index, _KIND_BLOCK)
    kind = "procedural" if place < 2 else "predictive"
    rng = _stream(seed, split, block, min(place, 2))
    scene = draw_scene(rng, split if split in ("train", "val", "test") else "train")
    if background is not None:
        scene = replace(scene, background=background)
    story = _procedural(rng, scene, language) if kind == "procedural" else _predictive(rng, scene, language, place - 2)

    words = _stream(seed, split, index, "words")
    told, drawn, noisy = story.answer, story.answer, False
    if split == "sft" and words.random() < SFT_WRONG_EVENTS:
        told, noisy = _other_event(words, scene, story.answer), True
    if split == "artist" and words.random() < ARTIST_MISMATCHED:
        drawn_event = None if words.random() < 0.6 else _other_event(words, scene, story.answer)
        target, noisy = render(scene, drawn_event), True
    else:
        target = render(scene, drawn)
    if split == "sft":
        caption = uniform_caption(told, words, language=language)
    elif split == "artist":
        caption = uniform_caption(told, words, DRAWN_WORDINGS, language)
    else:
        caption = head_caption(told, words, language, DRAWN_WORDINGS if drawable else 3)
    return ToySample(
        id=f"toy-{seed}-{split}-{index:06d}",
        kind=kind,
        question=story.question,
        caption=caption,
        thought=thought_of(story.shown, told, language),
        input_frames=render_there_and_back(scene, story.shown),
        target_frames=target,
        scene=scene,
        event=story.answer,
        noisy=noisy,
        language=language,
    )


def _other_event(rng: np.random.Generator, scene: Scene, right: Event) -> Event:
    wrong = [e for e in all_events(scene) if e != right]
    return wrong[int(rng.integers(len(wrong)))]


def shown_event(scene: Scene, frames: np.ndarray) -> Event | None:
    """The outcome whose ideal clip is nearest to ``frames`` (9, 32, 32, 3) uint8 in mean squared pixels; ``None`` = nothing happens.

    Raises ValueError on another shape.
    """
    candidates: list[Event | None] = [None, *all_events(scene)]
    ideals = np.stack([render(scene, event) for event in candidates]).astype(np.float32)
    if frames.shape != ideals.shape[1:]:
        raise ValueError(f"a toy clip has shape {ideals.shape[1:]} (frames, height, width, RGB), got {frames.shape}")
    distance = ((ideals - frames.astype(np.float32)) ** 2).mean(axis=(1, 2, 3, 4))
    return candidates[int(distance.argmin())]


def follow(meta_json: str, frames: np.ndarray) -> bool:
    """Whether a generated clip shows the sample's true event: of all outcomes of the scene it is nearest to the right one."""
    scene, event = read_meta(meta_json)
    return shown_event(scene, frames) == event


def follow_caption(meta_json: str, caption: str, frames: np.ndarray) -> bool:
    """Whether a generated clip shows what ``caption`` says in the sample's scene (false when the caption does not parse)."""
    scene, _ = read_meta(meta_json)
    event = parse_caption(caption)
    return event is not None and shown_event(scene, frames) == event
