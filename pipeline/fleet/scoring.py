"""Which pool answers for which component of an answer's scores: the reward pool for all that is built in and for functions, the pool of
a reward with a model for its own.

Requests go to their pools side by side, and each carries no more than its reward looks at. Lives in the driver's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.records import GroupScoreRequest, ScoreRequest, Scores
from actors.scoring.asking import stripped
from actors.scoring.components import VIDEO_FEATURES
from actors.scoring.model import Facts

Submit = Callable[[Any], Awaitable[Any]]


class Scoring:
    """Shares requests out. ``judges``: component → how its own pool is asked; ``facts``: what each component that
    a stage weighs, or that is not built in, says of itself.
    """

    def __init__(self, reward: Submit, judges: Mapping[str, Submit], facts: Mapping[str, Facts]) -> None:
        self._reward, self._judges, self._facts = reward, judges, facts

    def draws(self, components: Sequence[str]) -> bool:
        """Return whether an answer has to be drawn for one of ``components``."""
        return any(self._facts[name].drawn for name in components)

    def of_groups(self, components: Sequence[str]) -> tuple[str, ...]:
        """Return those of ``components`` that judge whole groups."""
        return tuple(name for name in components if name in self._judges and self._facts[name].group)

    def sees(self, components: Sequence[str], need: str) -> bool:
        """Return whether one of ``components`` looks at ``need``."""
        return any(need in self._facts.get(name, Facts()).needs for name in components)

    async def score(self, request: ScoreRequest) -> Scores:
        """Return the scores of one answer, without those components that judge whole groups. Raises what the pools raise."""
        groups = self.of_groups(request.components)
        alone = [name for name in request.components if name in self._judges and name not in groups]
        shared = tuple(name for name in request.components if name not in self._judges)
        asked: list[Awaitable[Any]] = [self._reward(replace(request, components=shared))]
        asked += [self._judges[name](self._for(name, request)) for name in alone]
        whole, *single = await asyncio.gather(*asked)
        values = dict(whole.values)
        for scores in single:
            values |= scores.values
        left_out = (*groups, VIDEO_FEATURES)  # features are no value
        return replace(whole, values={name: values[name] for name in request.components if name not in left_out})

    async def score_group(self, name: str, requests: Sequence[ScoreRequest]) -> list[float]:
        """Return the value of each answer of a group by the component ``name``, in the order of ``requests``."""
        answers = tuple(self._for(name, request) for request in requests)
        found: tuple[Scores, ...] = await self._judges[name](GroupScoreRequest(requests[0].sample_id, answers))
        return [scores.values[name] for scores in found]

    def _for(self, name: str, request: ScoreRequest) -> ScoreRequest:
        return stripped(replace(request, components=(name,)), self._facts[name].needs)
