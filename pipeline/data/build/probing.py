"""The stage that opens a source video for the first time: its contents' hash, its length, and whether its steps lie inside."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.settings import Section
from cluster.errors import DataError
from pipeline.data.build.files import placed
from pipeline.data.build.video import Build, Clip, Lost, Video
from pipeline.data.video import probe
from pipeline.support.location import sha256_of


class Probe:
    """Note ``digest`` and ``seconds`` of a video. A video that cannot be opened loses all of its clips.

    A step may end after its video by ``overshoot_s``: annotations round, and it is cut to the video's end then. One that lies
    further outside is lost.
    """

    name = "probe"

    class Settings(Section):
        """Settings of :class:`Probe`."""

        overshoot_s: Annotated[float, Field(ge=0, description="Seconds that a step may end after its video.")] = 1.0

    def __init__(self, *, settings: Settings | None = None, build: Build) -> None:
        self.settings, self.build = settings or self.Settings(), build

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, video: Video) -> Video:
        """Return ``video`` with its digest, its seconds, and the steps that lie inside of it."""
        if not video.path:  # its file was not found
            return video
        try:
            path = placed(self.build.root, video.path)
            info = probe(path, self.build.limits)
            video.digest = sha256_of(path)
        except (DataError, OSError) as error:
            video.lost.append(Lost(self.name, "video", "unreadable", str(error)))
            video.clips = []
            return video
        video.seconds = info.seconds
        kept: list[Clip] = []
        for clip in video.clips:
            if clip.start >= info.seconds or clip.end > info.seconds + self.settings.overshoot_s:
                told = f"the step is {clip.start:g}–{clip.end:g} s, and the video lasts {info.seconds:.2f} s"
                video.lost.append(Lost(self.name, f"clip {clip.index}", "outside its video", told))
                continue
            clip.end = min(clip.end, info.seconds)
            kept.append(clip)
        video.clips = kept
        return video
