"""What the dispatcher tells the driver to do, and which report it expects back. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """Create worker ``name``, wait for its place and call ``setup``; then ``started`` or ``died``."""

    name: str


@dataclass(frozen=True)
class Load:
    """Call ``load_weights(version)``; then ``loaded``, ``suspected`` or ``died``."""

    name: str
    version: int


@dataclass(frozen=True)
class Probe:
    """Call ``ping``; then ``probed``, ``suspected`` or ``died``."""

    name: str


@dataclass(frozen=True)
class Send:
    """Call ``process`` with these tickets' requests; then ``answered``, ``suspected`` or ``died``."""

    call: int
    name: str
    tickets: tuple[int, ...]


@dataclass(frozen=True)
class End:
    """End the process of ``name``: at once, or after ``shutdown`` where it is ``healthy``."""

    name: str
    healthy: bool


@dataclass(frozen=True)
class Deliver:
    """Ticket's answer."""

    ticket: int
    value: object


@dataclass(frozen=True)
class Reject:
    """Ticket's failure."""

    ticket: int
    error: Exception


Command = Start | Load | Probe | Send | End | Deliver | Reject
