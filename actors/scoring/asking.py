"""A reward with a model asked in batches, and what it answers held to its word: count, numbers, range. No torch, no Ray.

One outcome per request: where a batch fails, each of its requests is asked alone, so that only the one at fault fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from actors.failures import BadSampleError, InfrastructureError, Ok, Outcome, attempt
from actors.records import GroupScoreRequest, ScoreRequest, Scores
from actors.scoring.model import DRAWN, Facts
from actors.scoring.trying import transient, tried
from rewards.custom import as_number

R = TypeVar("R", ScoreRequest, GroupScoreRequest)

LARGEST = float(np.finfo(np.float32).max)
"""Largest value of a component, either sign: advantages are float32."""


ROUNDING = 1e-5
"""How far beyond its range a value may be, relative to the limit or to 1: float32 has seven digits."""


class BrokenRewardError(RuntimeError):
    """A reward that breaks its contract in a way that is no sample's: the run stops."""


class ModelScorer:
    """Asks ``model``, which has been set up, as the component ``name``. ``wait_s``: before the second of a request's three tries."""

    def __init__(self, name: str, path: str, model: Any, facts: Facts, *, wait_s: float = 0.5) -> None:
        self.name, self.path, self.model, self.facts, self.wait_s = name, path, model, facts, wait_s
        self._worked = False

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return ``Ok(Scores)`` or a Failure for each answer, in order."""
        return self._asked(list(requests), self._values)

    def score_groups(self, requests: Sequence[GroupScoreRequest]) -> list[Outcome]:
        """Return ``Ok`` with a tuple of Scores, or a Failure, for each group, in order."""
        return [outcome for request in requests for outcome in self._asked([request], self._group_values)]

    def _asked(self, requests: list[R], call: Callable[[list[R]], list[Any]]) -> list[Outcome]:
        if not requests:
            return []
        alone = len(requests) == 1
        outcome = attempt(lambda: self._tried(requests, call, alone))
        if isinstance(outcome, Ok):
            return [found if isinstance(found, Outcome) else Ok(found) for found in outcome.value]
        if alone or outcome.kind == "bug":
            return [outcome] * len(requests)
        return [self._asked([request], call)[0] for request in requests]

    def _tried(self, requests: list[R], call: Callable[[list[R]], list[Any]], alone: bool) -> list[Any]:
        try:
            # A batch has one try: its requests have theirs when they are asked alone.
            found = tried(
                self.path, lambda: call(requests), worked=self._worked, wait_s=self.wait_s, tries=3 if alone else 1
            )
        except BadSampleError as error:
            cause = error.__cause__
            if isinstance(cause, BrokenRewardError):
                raise cause from None
            if alone and cause is not None and transient(cause) and type(cause).__name__ == "OutOfMemoryError":
                raise InfrastructureError(str(error)) from error
            raise BadSampleError(f"{error}, for sample {requests[0].sample_id}") from cause
        self._worked = True
        return found

    def _values(self, requests: list[ScoreRequest]) -> list[Outcome]:
        values = self._listed(self.model.score([_given(r, self.facts) for r in requests]), len(requests), requests[0])
        return [attempt(partial(self._scores, r, v)) for r, v in zip(requests, values, strict=True)]

    def _group_values(self, requests: list[GroupScoreRequest]) -> list[tuple[Scores, ...]]:
        (request,) = requests
        answers = [_given(answer, self.facts) for answer in request.answers]
        values = self._listed(self.model.score_group(answers), len(answers), request)
        return [tuple(self._scores(answer, value) for answer, value in zip(answers, values, strict=True))]

    def _listed(self, values: Any, count: int, request: R) -> list[Any]:
        """Return the values one by one; BrokenRewardError where they are not as many as the answers."""
        listed = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(listed, list | tuple) or len(listed) != count:
            got = f"{len(listed)} values" if isinstance(listed, list | tuple) else f"a {type(listed).__name__}"
            raise BrokenRewardError(
                f"reward {self.name!r} ({self.path}) returned {got} for {count} answer(s), the first of sample "
                f"{request.sample_id}; it must return one value for each"
            )
        return list(listed)

    def _scores(self, request: ScoreRequest, value: Any) -> Scores:
        """Return the value as Scores; BadSampleError where it is no number or out of the reward's range."""
        who = f"component {self.name!r} of sample {request.sample_id}, answer {request.index}"
        try:
            number = as_number(self.path, value)
        except TypeError as error:
            raise BadSampleError(f"{who}: {error}") from error
        low, high = self.facts.range
        if not abs(number) <= LARGEST:
            raise BadSampleError(f"{who}, is {number}")
        if not low - ROUNDING * max(1.0, abs(low)) <= number <= high + ROUNDING * max(1.0, abs(high)):
            raise BadSampleError(f"{who}, is {number:g}, outside the range {low:g}…{high:g} that {self.path} declares")
        return Scores(request.sample_id, request.index, {self.name: number})


def stripped(request: ScoreRequest, needs: frozenset[str]) -> ScoreRequest:
    """Return ``request`` without what a component of these ``needs`` does not look at, which then need not travel."""
    return replace(
        request,
        clip=request.clip if needs & DRAWN else None,
        target_frames=request.target_frames if "pair" in needs else request.target_frames[:0],
        question=request.question if "question" in needs else "",
        input_frames=request.input_frames if "input_video" in needs else None,
    )


def read_only(array: np.ndarray | None) -> np.ndarray | None:
    """Return a view of ``array`` that cannot be written to: a reward must not change its neighbours' input."""
    if array is None:
        return None
    view = array.view()
    view.flags.writeable = False
    return view


def _given(request: ScoreRequest, facts: Facts) -> ScoreRequest:
    if facts.drawn and request.clip is None:
        raise BrokenRewardError(f"sample {request.sample_id}: a clip is needed, and there is none")
    bare = stripped(request, facts.needs)
    frames = {
        name: read_only(getattr(bare, name)) for name in ("clip", "target_frames", "last_input_frame", "input_frames")
    }
    return replace(bare, **frames)  # type: ignore[arg-type]
