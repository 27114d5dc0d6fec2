"""A user's own reward: a function named by its dotted path ``package.module:function``.

The function is called with keyword arguments only, one call per answer, in the process of a reward worker::

    def redness(*, clip, **_) -> float:
        return float(clip[..., 0].mean() / 255)

What it may name (see :data:`ARGUMENTS`) is what a score request holds. An answer for which the
function raises or returns ``float("nan")`` leaves its group; too many of them stop the run, which shows where it raised.
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

ARGUMENTS = ("sample_id", "text", "caption", "reference_caption", "clip", "target_frames", "last_input_frame")
"""sample_id: str; text: the raw completion; caption: what was rendered; reference_caption: ground truth; clip: uint8
(T', H, W, 3); target_frames: uint8 (T, H, W, 3); last_input_frame: uint8 (H, W, 3). Arrays are read-only, RGB."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_custom(name: str) -> bool:
    """Return whether a component's name is meant as a dotted path."""
    return ":" in name


def load_reward(path: str) -> CustomReward:
    """Import ``module:function`` and check that it can be called with :data:`ARGUMENTS`.

    Raises RewardError that says whether the spelling, the module, the function or its signature is wrong.
    """
    if not _PATH.fullmatch(path):
        raise RewardError(f"{path!r} is not a reward's dotted path; write package.module:function")
    module_name, function_name = path.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        cure = _hidden(path) or "; is it on the workers' PYTHONPATH?"
        raise RewardError(f"reward {path!r}: cannot import {module_name!r} ({error}){cure}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"reward {path!r}: {module_name} has no function {function_name!r}{_hidden(path)}")
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise RewardError(
            f"reward {path!r} cannot be called with the keyword arguments {', '.join(ARGUMENTS)} ({error}); "
            f"name those it needs after a * and take the rest as **_"
        ) from error
    return function


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
    """Return the function's value as a float: any real number, or an array or tensor that holds a single one.

    Raises TypeError for everything else. Text is no number, even where it spells one.
    """
    value = function(**arguments)
    try:
        number = value
        if np.ndim(value) > 0:  # a list, an array or a tensor, wherever it lies
            number = value.item() if hasattr(value, "item") else np.asarray(value).item()
        if isinstance(number, str | bytes | bytearray):
            raise TypeError("it is text")
        return float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"reward {path!r} returned {reprlib.repr(value)}; it must return a float") from error
