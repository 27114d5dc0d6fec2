"""``docs/configuration.md``: every key of a run, written from the schema by ``make docs`` and held to it by a test.

Reads the models in ``schema``; declares nothing.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.resume import is_free
from pipeline.config.schema import RunConfig
from pipeline.support.location import Uri


@dataclass(frozen=True)
class Key:
    """One key that a user may write."""

    path: str  # dotted, as in a command-line override
    type: str
    default: str
    description: str
    source: str  # the paper that introduced it; empty for the machinery's own keys


@dataclass(frozen=True)
class Part:
    """One section with its own keys; the sections inside it are parts of their own."""

    path: str  # dotted; empty for the run itself
    about: str
    keys: tuple[Key, ...]


def parts(model: type[BaseModel] = RunConfig, path: str = "", default: BaseModel | None = None) -> Iterator[Part]:
    """Yield the sections of ``model`` with their keys, outer before inner, in the schema's order."""
    default = default if default is not None else model()
    inner = {name: value for name in model.model_fields if isinstance(value := getattr(default, name), BaseModel)}
    keys = tuple(
        _key(f"{path}{name}", field, getattr(default, name))
        for name, field in model.model_fields.items()
        if name not in inner
    )
    yield Part(path.rstrip("."), " ".join((model.__doc__ or "").replace("``", "`").split()), keys)
    for name, value in inner.items():
        yield from parts(type(value), f"{path}{name}.", value)


def reference() -> str:
    """Return ``docs/configuration.md``."""
    lines = [
        "# Configuration",
        "",
        "Every key that a run's YAML may hold, with its type, its default, what it does and where it comes from. Written by",
        "`make docs` from the models in `pipeline/config`, and held to it by a test. A key can be overridden on the command",
        "line by its dotted path: `vans train toy stage1.grpo.kl_beta=0.01`. An unknown key, a value of another type or a",
        "contradiction is refused before anything starts. `vans train RUN --dry-run` prints a run with all of its values.",
        "",
        "A YAML may begin with `base:`, the name of a bundled run (`toy`, `vans_paper`, …) or the path of a file beside it, and",
        "then holds only what it changes: sections are merged key by key, lists and the rewards' weights are replaced as a",
        "whole. A base may have a base.",
        "",
        "A key marked ↻ may have another value when a run is resumed; any other change is refused ([faults](faults.md)).",
        "",
        "Scalars are those of YAML 1.2: `true` and `false` are the only booleans (`yes` and `on` are text), `010` is ten, `1e-5` is a",
        "number, `1_000`, `1:30` and dates are text. A key that stands twice in a mapping is an error, in a file and in an override;",
        "so is text, `true` or `5.0` where a whole number is meant. Of two overrides for one key the later counts. A value with",
        "characters that mean something in YAML (`#` after a space, `: `, a leading `%` or `{`) goes between quotes:",
        "`vans train toy 'out=\"runs/a #1\"'`.",
    ]
    for part in parts():
        if not part.keys:
            continue
        lines += ["", f"## {part.path or 'The run'}", "", part.about, ""]
        lines += ["| key | type | default | meaning | source |", "|---|---|---|---|---|"]
        for key in part.keys:
            mark = " ↻" if is_free(key.path) else ""
            cells = (f"`{key.path}`{mark}", key.type, f"`{key.default}`", key.description, key.source)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _key(path: str, field: FieldInfo, default: Any) -> Key:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    limits = " ".join(text for item in field.metadata if (text := _limit(item)))
    kind = f"{_type(field.annotation)} {limits}".strip()
    return Key(path, kind, _value(default), field.description or "", str(extra.get("source", "")))


def _limit(item: Any) -> str:
    names = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return " ".join(f"{sign} {getattr(item, name)}" for name, sign in names.items() if hasattr(item, name))


def _type(annotation: Any) -> str:
    """Return ``annotation`` as a user reads it: ``int > 0``, ``a, b or c``, ``text or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [text for item in arguments[1:] for m in getattr(item, "metadata", [item]) if (text := _limit(m))]
        return " ".join([_type(arguments[0]), *limits])
    if origin is Literal:
        return _choice([json.dumps(a) if not isinstance(a, str) else a for a in arguments])
    if origin in (Union, types.UnionType):
        return _choice([_type(a) for a in arguments])
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(_type(a) for a in arguments)}"
    names = {str: "text", Path: "path", Uri: "URI", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _choice(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _value(value: Any) -> str:
    if isinstance(value, Path):
        value = value.as_posix()
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(reference(), end="")
