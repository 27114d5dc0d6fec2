"""The forms of the models' answers: what JSON schema, and so guided decoding, holds them to."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from actors.endpoint.forms import Form
from pipeline.data.build.video import Pair

Text = Annotated[str, Field(min_length=1, pattern=r"\S", max_length=4000)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
VisualTie = Literal["place", "subject", "view", "time", "motion", "none"]
LogicalTie = Literal["order", "cause", "change", "none"]


class Description(Form):
    """What a clip of a step shows."""

    full_screen: bool
    clean: bool
    action: Text
    start: Seconds
    end: Seconds
    description: Text


class Wording(Form):
    """What a row says: question, reasoning, caption."""

    question: Text
    reasoning: Text
    caption: Text

    def of(self, pair: Pair) -> Pair:
        """Return ``pair`` with this wording."""
        return replace(pair, question=self.question, reasoning=self.reasoning, caption=self.caption)


class WhatIfs(Form):
    """What ties two shots, and what is asked of them; no question where one of the ties is missing."""

    visual_tie: VisualTie
    visual_why: str
    logical_tie: LogicalTie
    logical_why: str
    questions: Annotated[list[Wording], Field(max_length=8)]


class Verdict(Form):
    """What a reviewer finds wrong."""

    gives_away: bool
    several_answers: bool
    mentions_target: bool
    caption_mismatch: bool
    why: str
