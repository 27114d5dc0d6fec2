"""What all stages of a build share, and how a :class:`Video` becomes JSON and comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.build.store import WorkArea
from pipeline.data.build.video import SOURCE_LIMITS, Clip, Lost, Pair, Video
from pipeline.data.reading import VideoLimits
from pipeline.support.location import Uri

if TYPE_CHECKING:
    from pipeline.data.build.asking import Asker


@dataclass
class Build:
    """What a stage gets beside its settings."""

    root: Path | Uri  # folder of videos
    store: WorkArea
    seed: int = 0
    limits: VideoLimits = SOURCE_LIMITS
    languages: tuple[str, ...] = ("en",)  # ISO 639-1
    asker: Asker | None = None  # of a stage whose settings name a model


def video_to_json(video: Video) -> dict[str, Any]:
    """Return ``video`` as JSON values."""
    return asdict(video)


def video_of(values: dict[str, Any]) -> Video:
    """Return the video that :func:`video_to_json` made ``values`` of."""
    parts = {
        "clips": [Clip(**clip) for clip in values["clips"]],
        "pairs": [Pair(**pair) for pair in values["pairs"]],
        "lost": [Lost(**lost) for lost in values["lost"]],
    }
    return Video(**{**values, **parts})
