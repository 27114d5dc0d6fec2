"""The stage that finds the shots of a video, by PySceneDetect.

PySceneDetect compares frames and says between which two there is a cut. The frames, and when each is shown, come from our own
reader, so that its limits hold for the files of strangers, and the times are those by which clips are cut.
"""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from av.video.reformatter import Interpolation
from pydantic import Field
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from actors.settings import Section
from cluster.errors import DataError
from pipeline.data.build.files import placed
from pipeline.data.build.hashes import one_thread
from pipeline.data.build.video import Build, Clip, Lost, Video
from pipeline.data.reading import Part, Source, VideoLimits, check_span, frames_of, opened

Detector = Literal["adaptive", "content"]
DETECTORS = {"adaptive": (AdaptiveDetector, "adaptive_threshold"), "content": (ContentDetector, "threshold")}
SIDE = 256  # pixels of a frame's longer side in which cuts are looked for: PySceneDetect's own choice
_RATE = 25.0  # what PySceneDetect is told; every distance between cuts is allowed, so nothing depends on it


def find_shots(
    source: Source,
    limits: VideoLimits | None = None,
    *,
    detector: Detector = "adaptive",
    threshold: float | None = None,
) -> list[tuple[float, float]]:
    """Return the shots of ``source`` as [start, end) seconds from its first frame; a video without cuts is one shot.

    ``threshold`` is PySceneDetect's, by default its own for the ``detector``. Hard cuts are found; of dissolves it
    finds some. Every frame is decoded. Raises DataError.
    """
    limits = limits or VideoLimits()
    make, name = DETECTORS[detector]
    finder = make(min_scene_len=1, **({} if threshold is None else {name: threshold}))
    times: list[float] = []
    cuts: list[FrameTimecode] = []
    with (
        opened(source, limits) as (container, stream),
        closing(frames_of(container, stream, Part(), limits)) as pictures,
    ):
        for frame, shown in pictures:
            scale = min(1.0, SIDE / max(frame.width, frame.height))
            height, width = (max(1, round(side * scale)) for side in (frame.height, frame.width))
            small = frame.to_ndarray(format="bgr24", height=height, width=width, interpolation=Interpolation.AREA)
            cuts += finder.process_frame(FrameTimecode(len(times), _RATE), small)
            times.append(shown)
            check_span(times, limits)
    if not times:
        raise DataError("no frame could be decoded")
    cuts += finder.post_process(FrameTimecode(len(times) - 1, _RATE))
    # The last frame is on screen for as long as the others are on average.
    end = times[-1] + ((times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0)
    places = sorted({cut.frame_num for cut in cuts} - {0})
    edges = np.asarray([times[0], *(times[place] for place in places), end]) - times[0]
    return [(float(a), float(b)) for a, b in pairwise(edges) if b > a]


def in_parts(start: float, end: float, most: float) -> list[tuple[float, float]]:
    """Return [start, end) in as few parts of equal length as keep each within ``most`` seconds."""
    count = max(1, int(np.ceil((end - start) / most - 1e-9)))
    edges = np.linspace(start, end, count + 1)
    return [(float(a), float(b)) for a, b in pairwise(edges)]


class Shots:
    """Give a video its shots as clips. Shots that are too short are lost; one that is too long is divided, or lost."""

    name = "shots"

    class Settings(Section):
        """Settings of :class:`Shots`."""

        detector: Annotated[
            Detector,
            Field(
                description="PySceneDetect's detector: `adaptive` bears moving cameras, `content` has a fixed threshold."
            ),
        ] = "adaptive"
        threshold: Annotated[
            float | None,
            Field(gt=0, description="Of the detector; by default PySceneDetect's own. Lower finds more cuts."),
        ] = None
        min_s: Annotated[float, Field(gt=0, description="Shots shorter than this, in seconds, are lost.")] = 1.0
        max_s: Annotated[float, Field(gt=0, description="Seconds of the longest clip.")] = 10.0
        divide: Annotated[
            bool,
            Field(
                description="A longer shot becomes clips of equal length, which follow one another; otherwise it is lost."
            ),
        ] = True

    def __init__(self, *, settings: Settings | None = None, build: Build) -> None:
        self.settings, self.build = settings or self.Settings(), build

    def setup(self) -> None:
        """Keep OpenCV to one thread."""
        one_thread()

    def __call__(self, video: Video) -> Video:
        """Return ``video`` with its shots as clips, without what it had of them."""
        if not video.path or any(lost.what == "video" for lost in video.lost):
            return video
        chosen, video.clips = self.settings, []
        try:
            path = placed(self.build.root, video.path)
            shots = find_shots(path, self.build.limits, detector=chosen.detector, threshold=chosen.threshold)
        except DataError as error:
            video.lost.append(Lost(self.name, "video", "unreadable", str(error)))
            return video
        video.seconds = video.seconds or shots[-1][1]
        index = 0
        for start, end in shots:
            long = end - start > chosen.max_s
            parts = in_parts(start, end, chosen.max_s) if long and chosen.divide else [(start, end)]
            for begin, until in parts:
                shown = f"the shot {begin:.2f}–{until:.2f} s lasts {until - begin:.2f} s"
                if until - begin < chosen.min_s:
                    video.lost.append(Lost(self.name, f"clip {index}", "short", f"{shown}; min_s={chosen.min_s:g}"))
                elif until - begin > chosen.max_s + 1e-6:
                    video.lost.append(Lost(self.name, f"clip {index}", "long", f"{shown}; max_s={chosen.max_s:g}"))
                else:
                    video.clips.append(Clip(index, begin, until))
                index += 1
        return video
