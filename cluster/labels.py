"""Label selectors as Ray understands them, on paper: which nodes a role may stand on.

Ray matches them itself when it places something; this is for saying beforehand that no node can ever match. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:{_VALUE}/)?{_VALUE}")
_CONDITION = re.compile(rf"(!?)(?:in\(({_VALUE}(?:, ?{_VALUE})*)\)|({_VALUE}))")


def check_selector(selector: Mapping[str, str]) -> None:
    """Raise ValueError where ``selector`` is not label → ``value``, ``!value``, ``in(a, b)`` or ``!in(a, b)``."""
    for key, condition in selector.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"label {key!r} is not a label's name, such as ray.io/accelerator-type or disk")
        if not _CONDITION.fullmatch(condition):
            raise ValueError(f"label {key}={condition!r}: use a value, !value, in(a, b) or !in(a, b)")


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a node with ``labels`` meets every condition of ``selector``. A node without the label is not it."""
    return all(_meets(condition, labels.get(key)) for key, condition in selector.items())


def selector_text(selector: Mapping[str, str]) -> str:
    """Return ``selector`` for people: ``disk=ssd, zone=!in(a, b)``."""
    return ", ".join(f"{key}={condition}" for key, condition in sorted(selector.items()))


def _meets(condition: str, value: str | None) -> bool:
    found = _CONDITION.fullmatch(condition)
    if found is None:
        return False
    negated, several, one = found.groups()
    wanted = {part.strip() for part in several.split(",")} if several else {one}
    return (value in wanted) != bool(negated)
