"""How a worker's failures are classed, decided inside the worker before anything is pickled.

* ``infrastructure``: the machine, the engine or the transport failed; the same request may succeed elsewhere, so it is sent again.
* ``data``: this request can never succeed (a broken frame, an empty caption); its sample is quarantined, within a small budget.
* ``bug``: our code is wrong; the run stops and shows the traceback.

A worker answers each request with :class:`Ok` or :class:`Failure`; it raises only when it cannot answer at all.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import VansError

FailureKind = Literal["infrastructure", "data", "bug"]


class InfrastructureError(RuntimeError):
    """Raised inside a worker for a failure that another worker, or a retry, may survive."""


class BadSampleError(ValueError):
    """Raised inside a worker for a request that can never succeed; the sample goes to quarantine."""


@dataclass(frozen=True)
class Ok:
    """A request's answer."""

    value: Any


@dataclass(frozen=True)
class Failure:
    """A request's failure: its class, a message for people, and the worker's traceback as text."""

    kind: FailureKind
    message: str
    traceback: str = ""
    for_people: bool = False
    """It was raised on purpose, and its message says what to do: no traceback is needed."""


Outcome = Ok | Failure


def classify(error: BaseException) -> FailureKind:
    """Return the class of ``error``; whatever is not declared is a bug, so that nothing is retried for ever."""
    if isinstance(error, BadSampleError):
        return "data"
    if isinstance(error, (InfrastructureError, ConnectionError, TimeoutError, MemoryError)):
        return "infrastructure"
    return "bug"


def failure_of(error: BaseException) -> Failure:
    """Return ``error`` as a :class:`Failure` that pickles anywhere (text only)."""
    text = "".join(traceback.format_exception(error))
    return Failure(classify(error), f"{type(error).__name__}: {error}", text, isinstance(error, VansError))


def attempt(function: Callable[[], Any]) -> Outcome:
    """Run ``function`` and return its value as :class:`Ok`, or its classed failure."""
    try:
        return Ok(function())
    except Exception as error:  # noqa: BLE001 - classed and returned, never swallowed
        return failure_of(error)
