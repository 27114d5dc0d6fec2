"""The asking stages of a procedural build: what a clip of a step shows, and what is asked of two neighbouring steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from actors.settings import Section
from pipeline.data.build import prompts
from pipeline.data.build.asking import Asker, Rejected, Request
from pipeline.data.build.cutting import trim
from pipeline.data.build.models import Shown
from pipeline.data.build.rows import pair_name
from pipeline.data.build.schemas import Description, Wording
from pipeline.data.build.shared import Build
from pipeline.data.build.video import Clip, Lost, Pair, Video
from pipeline.data.importers.clips import ClipSpec


class Describe:
    """Keeps the clips that are full-screen and clean; gives each an action as its label, the seconds that show it, a description."""

    shows: ClassVar[bool] = True

    class Settings(Section):
        """How clips are described."""

        model: str = Field(..., description="Name of the model, which sees.")
        shortest_s: float = Field(3.0, gt=0, description="Shortest part that a clip is narrowed to.")
        longest_s: float = Field(5.0, gt=0, description="Longest part that a clip is narrowed to.")

    def __init__(self, *, settings: Settings, build: Build) -> None:
        assert build.asker is not None
        self.settings, self.build, self.asker = settings, build, build.asker

    def setup(self) -> None:
        """Nothing: the asker has its connection."""

    def __call__(self, video: Video) -> Video:
        """Describe each clip that was cut; a clip without a usable description is lost."""
        language = self.build.languages[0]
        clips = [clip for clip in video.clips if clip.stored]
        answers = self.asker.all([self._request(video, clip, language) for clip in clips])
        kept = [clip for clip in video.clips if not clip.stored]
        for clip, answer in zip(clips, answers):
            if (lost := self._taken(video, clip, answer)) is None:
                kept.append(clip)
            else:
                video.lost.append(lost)
        video.clips = sorted(kept, key=lambda clip: clip.index)
        return video

    def _request(self, video: Video, clip: Clip, language: str) -> Request:
        text = prompts.DESCRIBE[language].format(
            topic=prompts.topic_of(video.topic, language),
            label=clip.label or prompts.NO_LABEL[language],
            shortest=self.settings.shortest_s,
            longest=self.settings.longest_s,
        )
        shown = (Shown(prompts.CLIP[language], clip.stored),)
        return Request(prompts.SYSTEM[language], text, Description, shown, f"{video.name} clip {clip.index}")

    def _taken(self, video: Video, clip: Clip, answer: object) -> Lost | None:
        """Put ``answer`` into ``clip``; return why it is lost instead."""
        what = f"clip {clip.index}"
        if isinstance(answer, Rejected):
            return Lost(self.asker.stage, what, answer.reason, answer.told, answer.raw)
        assert isinstance(answer, Description)
        if not answer.full_screen:
            return Lost(
                self.asker.stage, what, "not full screen", "the model says that the scene does not fill the picture"
            )
        if not answer.clean:
            return Lost(
                self.asker.stage,
                what,
                "not clean",
                "the model says that something covers the picture or no one action is seen",
            )
        clip.label, clip.description = answer.action, answer.description
        length, settings = clip.end - clip.start, self.settings
        if 0 <= answer.start < min(answer.end, length):  # of a part that is not in the clip, all of the clip stays
            spec = ClipSpec(limits=self.build.limits)
            trim(
                video,
                clip,
                answer.start,
                answer.end,
                self.build,
                spec,
                least_s=settings.shortest_s,
                most_s=settings.longest_s,
            )
        return None


class Question:
    """Writes question, reasoning and caption of each pair of neighbouring steps, from their labels and descriptions."""

    shows: ClassVar[bool] = False

    class Settings(Section):
        """How questions are written."""

        model: str = Field(..., description="Name of the model; it is shown no clip.")

    def __init__(self, *, settings: Settings, build: Build) -> None:
        assert build.asker is not None
        self.settings, self.build, self.asker = settings, build, build.asker

    def setup(self) -> None:
        """Nothing: the asker has its connection."""

    def __call__(self, video: Video) -> Video:
        """Word each pair in each of the build's languages; a pair without a usable wording is lost."""
        pairs = [replace(pair, language=language) for pair in video.pairs for language in self.build.languages]
        answers = self.asker.all([self._request(video, pair) for pair in pairs])
        video.pairs = worded(video, pairs, answers, self.asker)
        return video

    def _request(self, video: Video, pair: Pair) -> Request:
        language = pair.language
        first, second = video.clip(pair.first), video.clip(pair.second)
        steps = prompts.JOIN[language].join(pair.skipped)
        text = prompts.QUESTION[language].format(
            topic=prompts.topic_of(video.topic, language),
            first=first.label,
            first_description=first.description or prompts.NO_LABEL[language],
            second=second.label,
            second_description=second.description or prompts.NO_LABEL[language],
            skipped=prompts.SKIPPED[language].format(steps=steps) if steps else "",
            skipped_rule=prompts.SKIPPED_RULE[language] if steps else "",
        )
        return Request(prompts.SYSTEM[language], text, Wording, (), f"{video.name} {pair_name(pair)} {language}")


def worded(video: Video, pairs: Sequence[Pair], answers: Sequence[object], asker: Asker) -> list[Pair]:
    """Return ``pairs`` with what ``answers`` say; those without a wording are lost."""
    kept = []
    for pair, answer in zip(pairs, answers):
        if isinstance(answer, Rejected):
            video.lost.append(Lost(asker.stage, pair_name(pair), answer.reason, answer.told, answer.raw))
            continue
        assert isinstance(answer, Wording)
        kept.append(answer.of(pair))
    return kept
