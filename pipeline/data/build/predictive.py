"""The asking stage of a predictive build: whether two shots are tied, and what-if questions whose answer is the second."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from actors.settings import Positive, Section
from pipeline.data.build import prompts
from pipeline.data.build.asking import Rejected, Request
from pipeline.data.build.models import Shown
from pipeline.data.build.rows import pair_name
from pipeline.data.build.schemas import WhatIfs
from pipeline.data.build.shared import Build
from pipeline.data.build.video import Lost, Pair, Video


class WhatIf:
    """Keeps the pairs of shots with a visual and a logical tie, and writes what-if questions, several for a pair."""

    shows: ClassVar[bool] = True

    class Settings(Section):
        """How what-if questions are written."""

        model: str = Field(..., description="Name of the model, which sees.")
        questions: Positive = Field(2, le=8, description="Questions of a pair of shots, at most.")

    def __init__(self, *, settings: Settings, build: Build) -> None:
        assert build.asker is not None
        self.settings, self.build, self.asker = settings, build, build.asker

    def setup(self) -> None:
        """Nothing: the asker has its connection."""

    def __call__(self, video: Video) -> Video:
        """Replace each pair by one for each question in each language; a pair without a tie, or without a question, is lost."""
        first_of = {(pair.first, pair.second): pair for pair in reversed(video.pairs)}
        asked = [
            replace(pair, number=0, language=language)
            for pair in reversed(first_of.values())
            for language in self.build.languages
        ]
        answers = self.asker.all([self._request(video, pair) for pair in asked])
        video.pairs = [made for pair, answer in zip(asked, answers) for made in self._made(video, pair, answer)]
        return video

    def _request(self, video: Video, pair: Pair) -> Request:
        language = pair.language
        shown = (
            Shown(prompts.FIRST[language], video.clip(pair.first).stored),
            Shown(prompts.SECOND[language], video.clip(pair.second).stored),
        )
        text = prompts.WHAT_IF[language].format(count=self.settings.questions)
        return Request(prompts.SYSTEM[language], text, WhatIfs, shown, f"{video.name} {pair_name(pair)} {language}")

    def _made(self, video: Video, pair: Pair, answer: object) -> list[Pair]:
        def lost(reason: str, told: str, raw: str = "") -> list[Pair]:
            video.lost.append(Lost(self.asker.stage, pair_name(pair), reason, told, raw))
            return []

        if isinstance(answer, Rejected):
            return lost(answer.reason, answer.told, answer.raw)
        assert isinstance(answer, WhatIfs)
        if answer.visual_tie == "none":
            return lost("no visual tie", answer.visual_why)
        if answer.logical_tie == "none":
            return lost("no logical tie", answer.logical_why)
        if not answer.questions:
            return lost("no question", "the model found both ties, and no question")
        ties: dict[str, str] = {answer.visual_tie: answer.visual_why, answer.logical_tie: answer.logical_why}
        wordings = answer.questions[: self.settings.questions]
        return [
            replace(
                pair, number=number, ties=ties, question=said.question, reasoning=said.reasoning, caption=said.caption
            )
            for number, said in enumerate(wordings)
        ]
