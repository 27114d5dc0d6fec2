"""Names of pool workers: which slot of which pool, and which incarnation of it.

``vdm-3`` is the first worker in slot 3 of pool ``vdm``; ``vdm-3.2`` is the second one to be started there. The slot
decides the placement-group bundle, so that a replacement starts where the dead worker was.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"(?P<pool>.+)-(?P<slot>\d+)(?:\.(?P<incarnation>\d+))?")


def worker_name(pool: str, slot: int, incarnation: int = 1) -> str:
    """Return the name of the ``incarnation``-th worker (from 1) in ``slot`` (from 0) of ``pool``."""
    return f"{pool}-{slot}" if incarnation == 1 else f"{pool}-{slot}.{incarnation}"


def slot_of(name: str) -> int:
    """Return the slot in a name made by :func:`worker_name`; anything else is a ``ValueError``."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a worker's name: <pool>-<slot> or <pool>-<slot>.<incarnation> is")
    return int(match["slot"])
