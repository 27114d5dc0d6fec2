"""A user's own reward: a function named by its dotted path ``package.module:function``.

The function is called with keyword arguments only, one call per answer, in the process of a reward worker::

    def redness(*, clip, **_) -> float:
        return float(clip[..., 0].mean() / 255)

What it may name (see :data:`ARGUMENTS`) is what a score request holds, and it gets no more than it names. A path whose last
part begins with a capital is a class: a reward with a model of its own (``actors.scoring.model``).
An answer for which the function raises or returns ``float("nan")`` leaves its group; too many of them stop the run, which
shows where it raised.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rewards.errors import RewardError

CustomReward = Callable[..., float]

ARGUMENTS = (
    "sample_id",
    "text",
    "caption",
    "reference_caption",
    "clip",
    "target_frames",
    "last_input_frame",
    "question",
    "input_frames",
)
"""sample_id: str; text: the raw completion; caption: what was rendered; reference_caption: ground truth; clip: uint8
(T', H, W, 3); target_frames: uint8 (T, H, W, 3); last_input_frame: uint8 (H, W, 3); question: str; input_frames: uint8
(T'', H', W', 3), the input video as the thinker sees it. Arrays are read-only, RGB."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_custom(name: str) -> bool:
    """Return whether a component's name is meant as a dotted path."""
    return ":" in name


def is_class(name: str) -> bool:
    """Return whether a component's name is the dotted path of a class: its last part begins with a capital."""
    return is_custom(name) and name.rpartition(":")[2][:1].isupper()


def imported(path: str, kind: str = "function") -> Any:
    """Return what ``module:name`` names, something to call; ``kind`` is what messages call it.

    Raises RewardError that says whether the spelling, the module or the name is wrong.
    """
    if not _PATH.fullmatch(path):
        raise RewardError(f"{path!r} is not a reward's dotted path; write package.module:{kind}")
    module_name, name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        cure = _hidden(path) or "; is it on the workers' PYTHONPATH?"
        raise RewardError(f"reward {path!r}: cannot import {module_name!r} ({error}){cure}") from error
    except Exception as error:
        raise RewardError(
            f"reward {path!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise RewardError(f"reward {path!r}: {module_name} has no {kind} {name!r}{_hidden(path)}")
    return found


def load_reward(path: str) -> CustomReward:
    """Import ``module:function`` and check that it can be called with :data:`ARGUMENTS`.

    Raises RewardError that says whether the spelling, the module, the function or its signature is wrong.
    """
    function: CustomReward = imported(path)
    try:
        inspect.signature(function).bind(**dict.fromkeys(named(function)))
    except TypeError as error:
        raise RewardError(
            f"reward {path!r} cannot be called with the keyword arguments {', '.join(ARGUMENTS)} ({error}); "
            f"name those it needs after a * and take the rest as **_"
        ) from error
    return function


def named(function: CustomReward) -> tuple[str, ...]:
    """Return which of :data:`ARGUMENTS` a reward function gets: those it names; all where it collects the rest (``**rest``).

    ``**_`` collects nothing: what is called so is not looked at.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD and not p.name.startswith("_") for p in parameters):
        return ARGUMENTS
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return tuple(name for name in ARGUMENTS if name in names)


def _hidden(path: str) -> str:
    """Return the cure where a user's file or folder has the name of a module that is found before it; else nothing."""
    top = re.split(r"[.:]", path, maxsplit=1)[0]
    found = importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
    origin = Path(found.origin) if found is not None and found.origin else None
    for entry in dict.fromkeys(Path(each or ".") for each in sys.path):
        for user in (entry / f"{top}.py", entry / top / "__init__.py"):
            if user.is_file() and (origin is None or not (origin.exists() and user.samefile(origin))):
                return (
                    f". {user} is not what is imported as {top!r}: {origin or 'a built-in module'} has that name and comes first. "
                    f"Rename yours, for example to my_{top}, and write my_{path}"
                )
    return ""


def call_reward(path: str, function: CustomReward, arguments: dict[str, Any]) -> float:
    """Return the function's value for those of ``arguments`` that it names, as :func:`as_number` reads it."""
    return as_number(path, function(**{name: arguments[name] for name in named(function) if name in arguments}))


def as_number(path: str, value: Any) -> float:
    """Return the ``value`` of the reward ``path`` as a float: any real number, or an array or tensor that holds a single one.

    Raises TypeError for everything else. Text is no number, even where it spells one.
    """
    try:
        number = value
        if np.ndim(value) > 0:  # a list, an array or a tensor, wherever it lies
            number = value.item() if hasattr(value, "item") else np.asarray(value).item()
        if isinstance(number, str | bytes | bytearray):
            raise TypeError("it is text")
        return float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"reward {path!r} returned {reprlib.repr(value)}; it must return a float") from error
