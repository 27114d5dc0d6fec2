"""The last asking stage: a model, the same or another, judges each row's wording; what has faults is written anew once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from actors.endpoint.forms import Form
from actors.settings import Section
from pipeline.data.build import prompts
from pipeline.data.build.asking import Rejected, Request
from pipeline.data.build.checks import Bounds, Fault, faults
from pipeline.data.build.models import Shown
from pipeline.data.build.rows import pair_name
from pipeline.data.build.schemas import Verdict, Wording
from pipeline.data.build.shared import Build
from pipeline.data.build.video import Lost, Pair, Video

REASONS = {
    "gives_away": "gives away",
    "several_answers": "several answers",
    "mentions_target": "mentions target",
    "caption_mismatch": "caption mismatch",
}


class Review:
    """Keeps the pairs in whose wording neither the checks (``checks``) nor the model find a fault, after one rewriting at most."""

    shows: ClassVar[bool] = True

    class Settings(Section):
        """How wordings are reviewed."""

        model: str = Field(..., description="Name of the model, which sees.")
        rewrite: bool = Field(
            True, description="Whether a wording with faults is written anew, once, and reviewed again."
        )
        bounds: Bounds = Field(default_factory=Bounds, description="Thresholds of the checks without a model.")

    def __init__(self, *, settings: Settings, build: Build) -> None:
        assert build.asker is not None
        self.settings, self.build, self.asker = settings, build, build.asker

    def setup(self) -> None:
        """Nothing: the asker has its connection."""

    def __call__(self, video: Video) -> Video:
        """Keep the pairs without a fault, in their order; the others are lost with the first of their faults."""
        kept: dict[int, Pair] = {}
        found = self._judged(video, list(enumerate(video.pairs)), kept, last=not self.settings.rewrite)
        if found:
            answers = self.asker.all([self._rewrite(video, pair, wrong) for _, pair, wrong in found])
            again = []
            for (place, pair, _), answer in zip(found, answers):
                if isinstance(answer, Rejected):
                    video.lost.append(Lost(self.asker.stage, pair_name(pair), answer.reason, answer.told, answer.raw))
                    continue
                assert isinstance(answer, Wording)
                again.append((place, answer.of(pair)))
            self._judged(video, again, kept, last=True)
        video.pairs = [kept[place] for place in sorted(kept)]
        return video

    def _judged(
        self, video: Video, pairs: Sequence[tuple[int, Pair]], kept: dict[int, Pair], *, last: bool
    ) -> list[tuple[int, Pair, list[Fault]]]:
        """Put the pairs without faults into ``kept`` and return the others with theirs; the ``last`` time these are lost."""
        checked = [(place, pair, self._checked(video, pair)) for place, pair in pairs]
        asked = [
            (place, pair) for place, pair, wrong in checked if not wrong
        ]  # the model is paid for what passes the checks only
        verdicts = dict(
            zip((place for place, _ in asked), self.asker.all([self._request(video, pair) for _, pair in asked]))
        )
        found = []
        for place, pair, wrong in checked:
            verdict = verdicts.get(place)
            if isinstance(verdict, Rejected):
                video.lost.append(Lost(self.asker.stage, pair_name(pair), verdict.reason, verdict.told, verdict.raw))
                continue
            if wrong := wrong or _faults_of(verdict):
                found.append((place, pair, wrong))
            else:
                kept[place] = pair
        if last:
            for _, pair, wrong in found:
                told = "; ".join(fault.told for fault in wrong)
                video.lost.append(Lost(self.asker.stage, pair_name(pair), wrong[0].reason, told, pair.question))
            return []
        return found

    def _checked(self, video: Video, pair: Pair) -> list[Fault]:
        described = [clip.description for clip in (video.clip(pair.first), video.clip(pair.second)) if clip.description]
        return faults(pair.question, pair.reasoning, pair.caption, pair.language, self.settings.bounds, described)

    def _request(self, video: Video, pair: Pair) -> Request:
        text = prompts.REVIEW[pair.language].format(
            question=pair.question, reasoning=pair.reasoning, caption=pair.caption
        )
        return self._shown(video, pair, text, Verdict)

    def _rewrite(self, video: Video, pair: Pair, wrong: Sequence[Fault]) -> Request:
        text = prompts.REWRITE[pair.language].format(
            question=pair.question,
            reasoning=pair.reasoning,
            caption=pair.caption,
            faults=prompts.JOIN[pair.language].join(fault.told for fault in wrong),
        )
        return self._shown(video, pair, text, Wording)

    def _shown(self, video: Video, pair: Pair, text: str, form: type[Form]) -> Request:
        language = pair.language
        shown = (
            Shown(prompts.FIRST[language], video.clip(pair.first).stored),
            Shown(prompts.SECOND[language], video.clip(pair.second).stored),
        )
        return Request(prompts.SYSTEM[language], text, form, shown, f"{video.name} {pair_name(pair)} {language}")


def _faults_of(verdict: object) -> list[Fault]:
    assert isinstance(verdict, Verdict)
    told = verdict.why or "the reviewer does not say why"
    return [Fault(reason, f"{reason}: {told}") for name, reason in REASONS.items() if getattr(verdict, name)]
