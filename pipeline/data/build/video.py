"""What goes through the stages of a build: a video with its clips, the pairs made of them, and what was lost on the way.

A row of Ray Data is one :class:`Video`. Clips' bytes do not travel in it: they lie in the build's store, by their contents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from actors.records import SampleKind
from pipeline.data.reading import VideoLimits
from pipeline.support.location import Uri

SOURCE_LIMITS = VideoLimits(max_frames=500_000, max_seconds=4 * 3600.0, max_bytes=16 << 30, max_decode_s=3600.0)
"""What is accepted of a source video: hours, where the default is made for clips."""


@dataclass
class Clip:
    """A part of a video: an annotated step or a shot."""

    index: int  # place in the video, from 0; kept when clips before it are lost, so that skipped steps can be told
    start: float  # seconds
    end: float  # seconds
    label: str = ""  # what the annotation says, later one action; empty for a shot
    description: str = ""  # dense caption
    stored: str = ""  # sha256 of the mp4's bytes, its name in the build's store; empty before it is cut
    phash: int = 0  # perceptual hash of all of its frames together, 64 bits
    hashes: list[int] = field(default_factory=list)  # perceptual hashes of single frames (``hashes``), in their order
    measures: dict[str, float] = field(default_factory=dict)  # of the gates, by name


@dataclass
class Pair:
    """Two clips of a video and what is asked of them: the input and the next event."""

    first: int  # Clip.index of the input
    second: int  # Clip.index of the next event
    kind: SampleKind
    number: int = 0  # several questions of one pair, from 0
    skipped: list[str] = field(default_factory=list)  # labels of the lost steps between them
    language: str = "en"  # ISO 639-1, as in ``meta``
    question: str = ""
    reasoning: str = ""
    caption: str = ""
    ties: dict[str, str] = field(default_factory=dict)  # what links the two, by name, in the model's words


@dataclass
class Lost:
    """A video, clip or pair that a stage refused."""

    stage: str
    what: str  # "video", "clip 3", "pair 3-4#1"
    reason: str  # one of few words that the funnel counts by: "dark", "refused", "not JSON", …
    told: str = ""  # the sentence for people, with the number and its threshold
    raw: str = ""  # the model's answer, where there was one


@dataclass
class Video:
    """A source video on its way through the stages."""

    name: str  # id of the source, unique in a build
    path: str  # below the recipe's folder of videos
    digest: str = ""  # sha256 of the file
    order: int = 0  # place among the sources: rows are written in this order
    topic: str = ""  # COIN's and YouCook2's recipe_type; empty where there is none
    seconds: float = 0.0
    steps: list[str] = field(
        default_factory=list
    )  # labels of all annotated steps by Clip.index, those of lost clips too
    clips: list[Clip] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)

    def clip(self, index: int) -> Clip:
        """Return the clip whose ``index`` is given; raises KeyError."""
        for clip in self.clips:
            if clip.index == index:
                return clip
        raise KeyError(index)


class Store(Protocol):
    """Where a build keeps the clips that it cut: a folder or a URI that all workers see."""

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its name, the sha256; a second call with the same bytes changes nothing."""
        ...

    def get(self, name: str) -> bytes:
        """Return the bytes of ``name``; raises DataError where they are gone."""
        ...


class Build(Protocol):
    """What all stages of a build share. It is sent to Ray Data's workers, so it pickles."""

    @property
    def root(self) -> Path | Uri:
        """Folder of the source videos, which every worker sees."""
        ...

    @property
    def store(self) -> Store:
        """Where clips are kept."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the run."""
        ...

    @property
    def limits(self) -> VideoLimits:
        """What is accepted of one source video."""
        ...


class Stage(Protocol):
    """One stage of a recipe: a class whose instances live in Ray Data's workers.

    It is made with its settings (a ``Section`` named ``Settings`` inside the class) as keyword ``settings`` and with ``build``, a
    :class:`Build`.
    """

    def setup(self) -> None:
        """Load what the stage needs, once in each worker."""
        ...

    def __call__(self, video: Video) -> Video:
        """Return ``video`` with what this stage adds. What it refuses moves to ``lost``; a bad video costs itself alone."""
        ...
