"""Small stages for the tests of the machinery: they cut and pair without a model, nap, fail, or kill their own worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.settings import Section
from cluster.errors import ConfigError, DataError
from pipeline.data.build.files import placed
from pipeline.data.build.shared import Build
from pipeline.data.build.video import Clip, Pair, Video
from pipeline.data.importers.clips import ClipSpec, copy_clip
from pipeline.data.video import encode_mp4


def write_videos(root: Path, count: int, seconds: int = 3, side: int = 32) -> None:
    """Write ``count`` videos of a moving square, each another one."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        frames = np.full((8 * seconds, side, side, 3), 20 + number, np.uint8)
        for place, frame in enumerate(frames):
            left = (place + 3 * number) % (side - 8)
            frame[8:16, left : left + 8] = (200, 10 * number % 255, 60)
        (root / f"v{number:03d}.mp4").write_bytes(encode_mp4(frames, 8.0, near_lossless=False))


class Pieces:
    """Cuts a video into clips of a second, and pairs neighbours; without a model it can word them too."""

    class Settings(Section):
        """How many, and whether they are worded too, without a model."""

        clips: int = 3
        words: bool = False

    def __init__(self, *, settings: Settings, build: Build) -> None:
        self.settings, self.build = settings, build

    def setup(self) -> None:
        """Nothing."""

    def __call__(self, video: Video) -> Video:
        path = placed(self.build.root, video.path)
        for index in range(self.settings.clips):
            data = copy_clip(path, float(index), float(index + 1), ClipSpec())
            video.clips.append(
                Clip(index, float(index), float(index + 1), label=f"step {index}", stored=self.build.store.put(data))
            )
        video.pairs = [Pair(index, index + 1, "procedural") for index in range(self.settings.clips - 1)]
        for pair in video.pairs if self.settings.words else ():
            pair.question, pair.caption = "What comes now?", f"Piece {pair.second} of {video.name}."
            pair.reasoning = "One piece follows the other."
        return video


class Faulty:
    """Does what a test wants to go wrong."""

    class Settings(Section):
        """What, and of which video."""

        how: str = ""
        name: str = ""
        once: str = ""  # file that says that it was done

    def __init__(self, *, settings: Settings, build: Build) -> None:
        self.settings = settings

    def setup(self) -> None:
        """Fail where a test wants it."""
        if self.settings.how == "setup":
            raise ConfigError("no weights at /nowhere; write the folder's right name")
        if self.settings.how == "setup bug":
            raise ZeroDivisionError("division by zero")

    def __call__(self, video: Video) -> Video:
        how: Any = self.settings.how if video.name.startswith(self.settings.name or video.name) else ""
        if how == "data":
            raise DataError("the picture is upside down")
        if how == "bug":
            raise ValueError("bad frame")
        if how == "config":
            raise ConfigError("the endpoint refuses the key")
        if how == "kill" and not Path(self.settings.once).exists():
            Path(self.settings.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return video


class Nap:
    """Sleeps as long as a video's service time, which its number decides, and makes nothing."""

    class Settings(Section):
        """Seconds of a video are ``shortest`` … ``longest``."""

        shortest: float = 0.0
        longest: float = 0.0

    def __init__(self, *, settings: Settings, build: Build) -> None:
        self.settings = settings

    def setup(self) -> None:
        """Nothing."""

    def __call__(self, video: Video) -> Video:
        low, high = self.settings.shortest, self.settings.longest
        time.sleep(low + (high - low) * (video.order * 7919 % 101) / 100)
        return video


class Ready:
    """Makes rows of two small clips that it does not cut, the same for all videos."""

    class Settings(Section):
        """Rows of a video."""

        rows: int = 10

    def __init__(self, *, settings: Settings, build: Build) -> None:
        self.settings, self.build = settings, build
        self.stored: list[str] = []

    def setup(self) -> None:
        """Store the two clips."""
        frames = np.zeros((2, 16, 16, 3), np.uint8)
        self.stored = [self.build.store.put(encode_mp4(frames + shade, 2.0, near_lossless=False)) for shade in (40, 90)]

    def __call__(self, video: Video) -> Video:
        video.clips = [Clip(place, place, place + 1.0, stored=name) for place, name in enumerate(self.stored)]
        words = {"question": "What comes now?", "caption": f"Something of {video.name}."}
        video.pairs = [Pair(0, 1, "predictive", number, **words) for number in range(self.settings.rows)]
        return video
