"""What makes two runs the same run: every key but those that do not change what is learnt.

A key or section is marked once, where it is declared (``json_schema_extra=FREE``). Reads the schema; declares nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from pipeline.config.load import flatten
from pipeline.config.schema import RunConfig


def free_keys(model: type[BaseModel] = RunConfig, path: str = "") -> Iterator[str]:
    """Yield the dotted keys and sections that may differ between a run and its continuation."""
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"):
            yield f"{path}{name}"
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from free_keys(field.annotation, f"{path}{name}.")


def is_free(key: str) -> bool:
    """Return whether the dotted ``key``, or a section around it, is free."""
    return any(key == name or key.startswith(f"{name}.") for name in _FREE)


def bound_values(config: RunConfig) -> dict[str, Any]:
    """Return the dotted keys of ``config`` that a continuation must share, with their values."""
    return {key: value for key, value in flatten(config).items() if not is_free(key)}


def config_digest(config: RunConfig) -> str:
    """Return a digest of everything in ``config`` that changes what Joint-GRPO learns."""
    return hashlib.sha256(json.dumps(bound_values(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], config: RunConfig, besides: Sequence[str] = ()) -> list[str]:
    """Return a line for each key in which ``config`` departs from ``old``, the dotted keys of a checkpoint.

    A key that the checkpoint does not know counts by its default, and one that the schema no longer knows not at all.
    ``besides`` are further dotted keys that may differ.
    """
    before = {key: value for key, value in old.items() if not is_free(key)}
    now = bound_values(config)
    defaults = bound_values(RunConfig())
    lines = []
    for key in sorted({*before, *now} - {*besides}):
        if key not in before and key in defaults and now[key] == defaults[key]:
            continue
        if key not in now and not _in_schema(key):
            continue
        was = json.dumps(before[key]) if key in before else "not set"
        is_now = json.dumps(now[key]) if key in now else "not set"
        if was != is_now:
            lines.append(f"{key}: {was} in the checkpoint, {is_now} now")
    return lines


def _in_schema(key: str) -> bool:
    """Return whether ``key`` is declared, or an entry of a mapping that is."""
    model: Any = RunConfig
    for part in key.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return True  # within a mapping of the user's own names
        if part not in model.model_fields:
            return False
        model = model.model_fields[part].annotation
    return True


_FREE = tuple(free_keys())
