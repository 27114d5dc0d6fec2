"""A reward with a model of its own: what its author writes, and how it is loaded. No Ray.

The author's class may derive from :class:`RewardModel` or :class:`GroupReward`, or have the same attributes. It is named
``module:Class``; its workers are a pool of their own (``model_worker``). What it answers is checked in ``asking``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from actors.records import ScoreRequest
from cluster.errors import VansError
from rewards.custom import imported, named
from rewards.errors import RewardError

if TYPE_CHECKING:  # a reward may have an environment of its own, without torch
    from torch import nn

Need = Literal["text", "clip", "pair", "question", "input_video"]
"""text: completion, caption and true caption. clip: the drawn clip. pair: it and the true clip. question: what was asked.
input_video: the frames that it was asked about."""

NEEDS: tuple[str, ...] = get_args(Need)
DRAWN = frozenset({"clip", "pair"})
"""Needs for which an answer has to be drawn."""


class RewardLoadError(VansError):
    """A reward that cannot be loaded, at the run's start or when it is first asked: the run's fault, and no sample's."""


class RewardModel:
    """A reward that has a model, asked for many answers at a time.

    ``needs``: what it looks at (:data:`NEEDS`); the rest of a request is empty. ``range``: least and largest value.
    Options of the configuration are the constructor's keyword arguments; the constructor loads nothing.
    """

    needs: Sequence[str] = ("text",)
    range: tuple[float, float] = (-math.inf, math.inf)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The torch modules: what rests, is hashed before and after a stage, and counts as memory."""
        return ()

    def setup(self, device: str, dtype: str) -> None:
        """Load the model. ``device``: ``cpu`` or ``cuda``; ``dtype``: ``float32``, ``bfloat16`` or ``float16``.

        Whatever it raises stops the run with its message.
        """

    def parameters(self) -> int | None:
        """Return how many parameters :meth:`setup` will load, for ``vans plan``; None where that is not known."""
        return None

    def score(self, requests: Sequence[ScoreRequest]) -> Sequence[float]:
        """Return a value within ``range`` for each request, in order; none depends on what else is in the batch.

        Raise where an answer cannot be judged: it then leaves its group. Arrays are read-only.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score()")


class GroupReward(RewardModel):
    """A reward that sees all answers to one question at once: diversity, ranks, judges of pairs."""

    def score_group(self, answers: Sequence[ScoreRequest]) -> Sequence[float]:
        """Return a value within ``range`` for each of a group's well-formed answers, in order of their ``index``."""
        raise NotImplementedError(f"{type(self).__name__} has no score_group()")


@dataclass(frozen=True)
class Facts:
    """What a component says of itself."""

    needs: frozenset[str] = frozenset({"text"})
    range: tuple[float, float] = (-math.inf, math.inf)
    group: bool = False
    """Whether it judges whole groups."""

    @property
    def drawn(self) -> bool:
        """Whether answers have to be drawn for it."""
        return bool(self.needs & DRAWN)


def function_needs(function: Callable[..., Any]) -> frozenset[str]:
    """Return what a reward function looks at, by the arguments that it names (``rewards.custom.ARGUMENTS``)."""
    asked = set(named(function))
    needs = {"text"} | ({"clip", "question"} & asked)
    if {"clip", "target_frames"} <= asked:
        needs.add("pair")
    return frozenset(needs | ({"input_video"} if "input_frames" in asked else set()))


def load_model(path: str, options: Mapping[str, Any]) -> Any:
    """Return an instance of ``module:Class``, which has loaded nothing yet.

    Raises RewardLoadError that says whether the path, the options or an attribute is wrong.
    """
    try:
        made = imported(path, "Class")
    except RewardError as error:
        raise RewardLoadError(str(error)) from error
    if not isinstance(made, type):
        raise RewardLoadError(
            f"reward {path!r} is no class; a function is named in rewards.weights alone, and begins with a small letter"
        )
    try:
        model = made(**options)
    except Exception as error:
        raise RewardLoadError(f"reward {path!r} with the options {dict(options)}: {_said(error)}") from error
    facts_of(path, model)
    return model


def facts_of(path: str, model: Any) -> Facts:
    """Return what ``model`` says of itself; RewardLoadError where that is not what a reward is to say."""
    group = callable(getattr(model, "score_group", None))
    if not group and not callable(getattr(model, "score", None)):
        raise RewardLoadError(f"reward {path!r} has neither score(requests) nor score_group(answers)")
    if not callable(getattr(model, "setup", None)):
        raise RewardLoadError(f"reward {path!r} has no setup(device, dtype); derive it from RewardModel or GroupReward")
    needs = getattr(model, "needs", ("text",))
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    unknown = [need for need in needs if need not in NEEDS]
    if unknown:
        raise RewardLoadError(f"reward {path!r} needs {unknown}; there are {', '.join(NEEDS)}")
    try:
        low, high = map(float, getattr(model, "range", (-math.inf, math.inf)))
    except (TypeError, ValueError) as error:
        raise RewardLoadError(f"reward {path!r}: range={model.range!r} is not (least, largest)") from error
    if not low < high:
        raise RewardLoadError(f"reward {path!r}: range=({low:g}, {high:g}) holds no two values; give (least, largest)")
    return Facts(frozenset(needs), (low, high), group)


def start_model(path: str, model: Any, device: str, dtype: str) -> None:
    """Have ``model`` load itself, frozen. Raises RewardLoadError with what it raised."""
    try:
        model.setup(device, dtype)
        modules = modules_of(model)
    except VansError as error:
        raise RewardLoadError(f"reward {path!r}: {error}") from error
    except Exception as error:
        raise RewardLoadError(f"reward {path!r} cannot be loaded: {_said(error)}") from error
    for module in modules:
        module.eval().requires_grad_(False)


def modules_of(model: Any) -> tuple[nn.Module, ...]:
    """Return the torch modules of ``model``; none where it has none."""
    return tuple(getattr(model, "modules", None) or ())


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
