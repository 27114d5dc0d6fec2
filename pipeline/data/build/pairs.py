"""The stage that makes pairs: a clip and the one that follows it in its video."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field

from actors.records import SampleKind
from actors.settings import Positive, Section
from pipeline.data.build.video import Build, Clip, Lost, Pair, Video

OVERLAP_S = 0.5  # seconds that annotated steps may overlap: people mark a step's end after the next one's beginning


class Neighbours:
    """Pair each kept clip with the next kept one. Clips that were lost between them are counted, and their labels kept in ``skipped``.

    A procedural pair is of steps: a question about it can tell what was skipped. A predictive one is of shots.
    """

    name = "neighbours"

    class Settings(Section):
        """Settings of :class:`Neighbours`."""

        kind: Annotated[
            SampleKind, Field(description="Kind of the samples: `procedural` for steps, `predictive` for shots.")
        ]
        max_skipped: Annotated[
            int,
            Field(ge=0, description="Clips that may be lost between the two of a pair; with more, there is no pair."),
        ] = 2
        max_gap_s: Annotated[
            float | None, Field(ge=0, description="Seconds that may lie between the two clips of a pair; null: any.")
        ] = None
        questions: Annotated[
            Positive, Field(description="Questions that are asked of each pair, each a row of its own.")
        ] = 1

    def __init__(self, *, settings: Settings, build: Build) -> None:
        self.settings, self.build = settings, build

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, video: Video) -> Video:
        """Return ``video`` with the pairs of its clips, in their order; a video of fewer than two clips has none."""
        video.pairs = []
        for first, second in pairwise(sorted(video.clips, key=lambda clip: clip.index)):
            what = f"pair {first.index}-{second.index}"
            if refused := self._refused(first, second):
                video.lost.append(Lost(self.name, what, *refused))
                continue
            # Of shots there are none.
            skipped = [label for label in video.steps[first.index + 1 : second.index] if label]
            for number in range(self.settings.questions):
                video.pairs.append(Pair(first.index, second.index, self.settings.kind, number, list(skipped)))
        return video

    def _refused(self, first: Clip, second: Clip) -> tuple[str, str] | None:
        """Return the reason and the sentence for people where the two make no pair."""
        chosen = self.settings
        between = second.index - first.index - 1
        if between > chosen.max_skipped:
            return "too many skipped", f"{between} clips between the two were lost; max_skipped={chosen.max_skipped}"
        gap = second.start - first.end
        if gap < -OVERLAP_S:
            return "overlap", f"the second begins at {second.start:.2f} s, and the first ends at {first.end:.2f} s"
        if chosen.max_gap_s is not None and gap > chosen.max_gap_s:
            return "far apart", f"{gap:.2f} s lie between the two; max_gap_s={chosen.max_gap_s:g}"
        return None
