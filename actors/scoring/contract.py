"""Whether a reward keeps its promises: the contract tests that anyone can run on an own one (``vans reward check``). No Ray.

Each promise is one that a run relies on; ``check_reward`` returns what was found of each. The answers to judge are the caller's.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from actors.failures import Failure, Ok, Outcome
from actors.records import GroupScoreRequest, ScoreRequest
from actors.scoring.asking import ModelScorer
from actors.scoring.model import (
    Facts,
    RewardLoadError,
    RewardModel,
    facts_of,
    function_needs,
    load_model,
    modules_of,
    start_model,
)
from rewards.custom import call_reward, is_class, load_reward
from rewards.errors import RewardError

NAME = "reward"
TOLERANCE = 1e-5
"""Largest difference between two values of one answer, relative to the spread of all values or to 1, that counts as the same."""
SLOW_S = 5.0
"""Seconds for one answer from which on a reward is slow."""


@dataclass(frozen=True)
class Promise:
    """One promise of a reward and what was found of it; ``weak``: a run works, and something is worth a look."""

    name: str
    verdict: Literal["kept", "weak", "broken"]
    found: str


class FunctionReward(RewardModel):
    """A reward function as a reward with a model: for the checks alone."""

    def __init__(self, path: str) -> None:
        self._path, self._function = path, load_reward(path)
        self.needs = tuple(function_needs(self._function))

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """See :class:`RewardModel`."""
        return [call_reward(self._path, self._function, vars(request)) for request in requests]


def check_reward(
    path: str,
    answers: Sequence[ScoreRequest],
    odd: Mapping[str, ScoreRequest],
    *,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    elsewhere: bool = True,
) -> list[Promise]:
    """Return what was found of each promise of the reward ``path``, ``module:Class`` or ``module:function``.

    ``answers``: at least four ordinary ones, which differ in text and clip; of a group reward, one group. ``odd``: answers at the
    edges, by what is odd in them. ``elsewhere``: start another process too, which loads the reward a second time.
    A reward that cannot be loaded has one promise, broken.
    """
    try:
        model = _loaded(path, options or {})
        began = time.perf_counter()
        start_model(path, model, device, dtype)
        loaded_s = time.perf_counter() - began
        facts = facts_of(path, model)
    except (RewardLoadError, RewardError) as error:
        return [Promise("loads", "broken", str(error))]
    asked = _Asked(ModelScorer(NAME, path, model, facts, wait_s=0.0), facts)
    before = _hash(model)
    first, seconds = _timed(lambda: asked.all(answers))
    refused = [outcome.message for outcome in first if isinstance(outcome, Failure)]
    told = f"in {loaded_s:.1f} s on {device}; needs {', '.join(sorted(facts.needs))}"
    promises = [Promise("loads", "kept", told)]
    if refused:
        return [
            *promises,
            Promise("judges", "broken", f"{len(refused)} of {len(answers)} ordinary answers: {refused[0]}"),
        ]
    values = _values(first)
    promises += [
        _varies(values),
        _ranged(facts, values),
        _same("determinism", values, _values(asked.all(answers)), "a second time"),
        *asked.independence(answers, values),
        *([_elsewhere(path, options or {}, device, dtype, answers, values)] if elsewhere else []),
        _odd(asked, odd, answers),
        _frozen(before, _hash(model), model),
        _quick(seconds, len(answers)),
    ]
    return promises


class _Asked:
    """One way to ask rewards of both kinds: all answers together, or in parts."""

    def __init__(self, scorer: ModelScorer, facts: Facts) -> None:
        self._scorer, self.group = scorer, facts.group

    def all(self, answers: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return an outcome for each answer; a group that fails fails for each of them."""
        if not self.group:
            return self._scorer.score(answers)
        (outcome,) = self._scorer.score_groups([GroupScoreRequest(answers[0].sample_id, tuple(answers))])
        if isinstance(outcome, Failure):
            return [outcome] * len(answers)
        return [Ok(scores) for scores in outcome.value]

    def independence(self, answers: Sequence[ScoreRequest], values: np.ndarray) -> list[Promise]:
        """Return whether a value depends on what else is asked, or in which order."""
        back = _values(self.all(list(reversed(answers))))[::-1]
        if self.group:
            return [_same("order", values, back, "in reverse order")]
        alone = np.concatenate([_values(self.all([answer])) for answer in answers])
        return [_same("batch independence", values, alone, "alone"), _same("order", values, back, "in reverse order")]


def _values(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Return the values (N,), NaN for a failure."""
    return np.array([o.value.values[NAME] if isinstance(o, Ok) else math.nan for o in outcomes])


def _same(name: str, first: np.ndarray, second: np.ndarray, how: str) -> Promise:
    if np.array_equal(first, second):
        return Promise(name, "kept", f"the same to the bit {how}")
    worst = int(np.argmax(np.nan_to_num(np.abs(first - second), nan=math.inf)))
    told = f"answer {worst} is {first[worst]:.6g}, and {second[worst]:.6g} {how}"
    near = np.allclose(first, second, rtol=0.0, atol=TOLERANCE * max(1.0, float(np.ptp(first))))
    if near:
        return Promise(name, "weak", f"{told}: a resumed or repeated run will differ in its last digits")
    return Promise(name, "broken", f"{told}: a request that is sent again would earn another reward")


def _varies(values: np.ndarray) -> Promise:
    if np.ptp(values) > 0:
        return Promise("judges", "kept", f"{values.min():.4g}…{values.max():.4g} over {len(values)} answers")
    return Promise("judges", "weak", f"always {values[0]:.4g}: answers that do not differ in it teach nothing")


def _ranged(facts: Facts, values: np.ndarray) -> Promise:
    low, high = facts.range  # a value outside has failed before
    if math.isinf(low) or math.isinf(high):
        return Promise("range", "weak", f"declares {low:g}…{high:g}; with a finite one a run says when a value is off")
    return Promise("range", "kept", f"declares {low:g}…{high:g}")


def _elsewhere(
    path: str, options: Mapping[str, Any], device: str, dtype: str, answers: Sequence[ScoreRequest], values: np.ndarray
) -> Promise:
    """Return whether another process, to which options and answers are sent, gives the same values."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            found = other.submit(values_of, path, dict(options), device, dtype, list(answers)).result()
    except Exception as error:  # noqa: BLE001 - told to the author
        return Promise("pickling", "broken", f"another process cannot judge: {type(error).__name__}: {error}")
    return _same("pickling", values, found, "in another process")


def values_of(
    path: str, options: Mapping[str, Any], device: str, dtype: str, answers: Sequence[ScoreRequest]
) -> np.ndarray:
    """Return the values (N,) of ``answers`` by the reward ``path``, loaded in this process; NaN for a failure."""
    model = _loaded(path, options)
    start_model(path, model, device, dtype)
    facts = facts_of(path, model)
    return _values(_Asked(ModelScorer(NAME, path, model, facts, wait_s=0.0), facts).all(answers))


def _loaded(path: str, options: Mapping[str, Any]) -> Any:
    return load_model(path, options) if is_class(path) else FunctionReward(path)


def _odd(asked: _Asked, odd: Mapping[str, ScoreRequest], answers: Sequence[ScoreRequest]) -> Promise:
    """Return what became of the odd answers: a number, or a reason; NaN is neither."""
    refused: list[str] = []
    for name, request in odd.items():
        group = [request, *(replace(a, index=a.index + 1) for a in answers[:1])] if asked.group else [request]
        outcome = asked.all(group)[0]
        if isinstance(outcome, Failure):
            reason = outcome.message.splitlines()[0]
            if outcome.kind != "data":
                return Promise("odd answers", "broken", f"{name} would end a run: {reason}")
            if "is nan" in reason or "is inf" in reason or "is -inf" in reason or "outside the range" in reason:
                return Promise("odd answers", "broken", f"{name}: {reason}; raise where an answer cannot be judged")
            refused.append(name)
    if refused:
        return Promise("odd answers", "weak", f"not judged, so they would leave their groups: {', '.join(refused)}")
    return Promise("odd answers", "kept", f"a value for each of {', '.join(odd)}")


def _frozen(before: str, after: str, model: Any) -> Promise:
    if before != after:
        return Promise(
            "frozen", "broken", "its modules' weights changed while it judged; a stage would end with an error"
        )
    modules = modules_of(model)
    if not modules:
        return Promise("frozen", "kept", "it has no torch modules")
    size = sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return Promise("frozen", "kept", f"{len(modules)} module(s) of {size / 2**20:.1f} MiB stay as they are")


def _quick(seconds: float, count: int) -> Promise:
    each = seconds / count
    told = f"{each * 1000:.3g} ms for each of {count} answers asked together"
    if each > SLOW_S:
        return Promise("speed", "weak", f"{told}: give its pool more workers, or a GPU")
    return Promise("speed", "kept", told)


def _timed(work: Callable[[], list[Outcome]]) -> tuple[list[Outcome], float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def _hash(model: Any) -> str:
    modules = modules_of(model)
    if not modules:
        return ""
    from actors.scoring.hashing import modules_hash

    return modules_hash(*modules)
