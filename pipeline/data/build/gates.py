"""The stage that refuses clips before any model is asked: each measure of ``measures`` against a threshold.

Where thresholds come from: on the real clips here and on copies of them with bars, insets, text, flashes and the like drawn in,
each lies between what must pass and what must not (tests/pipeline/data/build/test_gates.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from actors.settings import Fraction, Section
from cluster.errors import DataError
from pipeline.data.build import measures
from pipeline.data.build.cutting import LOOKED_FPS, clip_frames, note_hashes, note_measures
from pipeline.data.build.hashes import one_thread
from pipeline.data.build.video import Build, Clip, Lost, Video

if TYPE_CHECKING:
    from actors.scoring.clip import ClipScorer

CLIP_FRAMES = 4  # of a clip that CLIP sees


@dataclass(frozen=True)
class Rule:
    """A measure, the setting that is its threshold, and what is said of a clip beyond it."""

    measure: str
    reason: str
    setting: str
    told: str
    least: bool = False  # whether the setting is the least that passes; otherwise the most

    def refuses(self, value: float, settings: Gates.Settings) -> str:
        """Return the sentence for people where ``value`` does not pass, else nothing."""
        threshold = getattr(settings, self.setting)
        if threshold is None or (value >= threshold if self.least else value <= threshold):
            return ""
        return f"{self.told.format(value)}; {self.setting}={threshold:g}"


RULES = (
    Rule("seconds", "short", "min_s", "it lasts {:.2f} s", least=True),
    Rule("brightness", "dark", "min_brightness", "its mean brightness is {:.3f}", least=True),
    Rule("border", "border", "max_border", "bars take {:.3f} of the picture"),
    Rule("inset", "inset", "max_inset", "a frame in the picture is {:.2f} complete"),
    Rule("motion", "still", "min_motion", "{:.4f} of its pixels change within half a second", least=True),
    Rule("flashes", "flashes", "max_flashes", "it has {:.2f} flashes a second"),
    Rule("text", "text", "max_text", "overlaid text takes {:.3f} of the picture"),
    Rule("likeness", "near-duplicate", "max_likeness", "{:.2f} of its frames look like one of the clip before"),
    Rule("clip_likeness", "near-duplicate", "max_clip_likeness", "CLIP's cosine with the clip before is {:.4f}"),
)


class Gates:
    """Refuse clips that are no good footage, each with the number and its threshold. A threshold of null opens its gate.

    Near-duplicates are looked for between a clip and the last one before it that passed.
    """

    name = "gates"

    class Settings(Section):
        """Settings of :class:`Gates`."""

        min_s: Annotated[float | None, Field(ge=0, description="Seconds of the shortest clip.")] = 0.5
        min_brightness: Annotated[Fraction | None, Field(description="Least mean brightness.")] = 0.08
        max_border: Annotated[
            Fraction | None, Field(description="Most of the picture that bars at its edges may take.")
        ] = 0.03
        max_inset: Annotated[
            Fraction | None,
            Field(description="How complete the frame of a picture in the picture, or of margins around it, may be."),
        ] = 0.6
        min_motion: Annotated[
            Fraction | None, Field(description="Least share of pixels that change within half a second.")
        ] = 0.005
        max_flashes: Annotated[float | None, Field(ge=0, description="Flashes a second.")] = 0.5
        max_text: Annotated[Fraction | None, Field(description="Most of the picture that overlaid text may take.")] = (
            0.012
        )
        max_likeness: Annotated[
            Fraction | None,
            Field(description="Most frames of a clip, as a share, that may look like one of the clip before."),
        ] = 0.85
        clip: Annotated[
            str | None, Field(description="Folder of a CLIP model that compares neighbours too; by default none does.")
        ] = None
        max_clip_likeness: Annotated[
            float | None,
            Field(ge=-1, le=1, description="Largest cosine of the mean features of neighbours, with `clip`."),
        ] = 0.99

    def __init__(self, *, settings: Settings | None = None, build: Build) -> None:
        self.settings, self.build = settings or self.Settings(), build
        self._clip: ClipScorer | None = None

    def setup(self) -> None:
        """Load CLIP where a folder is given; raises CheckpointError."""
        one_thread()
        if self.settings.clip is not None:
            from actors.scoring.clip import ClipScorer

            self._clip = ClipScorer(self.settings.clip)

    def __call__(self, video: Video) -> Video:
        """Return ``video`` with the clips that pass, their measures and perceptual hashes; the others are lost.

        The measures that ``cut`` took are taken for granted; what was not cut is read now.
        """
        kept: list[Clip] = []
        before: np.ndarray | None = None  # CLIP's feature of the last clip that was kept
        for clip in video.clips:
            try:
                if not clip.measures:  # of a clip that was not cut
                    frames, fps = clip_frames(video, clip, self.build, fps=LOOKED_FPS)
                    note_hashes(clip, frames, fps)
                    note_measures(clip, frames, fps)
                feature = self._feature(video, clip)
            except DataError as error:
                video.lost.append(Lost(self.name, f"clip {clip.index}", "unreadable", str(error)))
                continue
            found = clip.measures | {"seconds": clip.end - clip.start}
            if kept:
                found["likeness"] = measures.likeness(clip.hashes, kept[-1].hashes)
            if feature is not None and before is not None:
                found["clip_likeness"] = float(feature @ before)
            clip.measures = found
            refused = first_refusal(found, self.settings)
            if refused is None:
                kept.append(clip)
                before = feature
            else:
                video.lost.append(Lost(self.name, f"clip {clip.index}", refused[0].reason, refused[1]))
        video.clips = kept
        return video

    def _feature(self, video: Video, clip: Clip) -> np.ndarray | None:
        """Return CLIP's mean feature of a few frames of ``clip``, of length 1; None without a model."""
        if self._clip is None:
            return None
        frames, _ = clip_frames(video, clip, self.build, fps=LOOKED_FPS, most=CLIP_FRAMES)
        mean = self._clip.image_features([frames])[0].mean(axis=0)
        return mean / max(float(np.linalg.norm(mean)), 1e-12)


def first_refusal(found: dict[str, float], settings: Gates.Settings) -> tuple[Rule, str] | None:
    """Return the first rule that the measures ``found`` do not pass, and what it says, or None."""
    for rule in RULES:
        if rule.measure in found and (told := rule.refuses(found[rule.measure], settings)):
            return rule, told
    return None
