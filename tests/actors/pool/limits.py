"""A pool's settings, and how it watches, from one set of names."""

from __future__ import annotations

import dataclasses
from typing import Any

from actors.pool.settings import PoolSection, Watch


def limits(**values: Any) -> tuple[PoolSection, Watch]:
    """What a pool takes: each of ``values`` goes to where there is a field of its name."""
    watched = {field.name for field in dataclasses.fields(Watch)} & values.keys()
    rest = {name: value for name, value in values.items() if name not in watched}
    return PoolSection(**rest), Watch(**{name: values[name] for name in watched})
