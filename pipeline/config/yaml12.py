"""YAML as people expect it: the scalars of YAML 1.2's core schema, and no key twice.

PyYAML reads YAML 1.1, where ``yes`` is true, ``010`` is eight, ``1:30`` is ninety, ``1e-5`` is text, and of two equal keys the last
one wins. Here ``true`` and ``false`` are the only booleans, numbers are decimal (``0o10`` and ``0x10`` say otherwise), dates are
text, and a key that stands twice is an error. Merge keys (``<<``) are read, because people use them; a mapping's own keys win.

Every YAML that this project reads goes through :func:`parse_yaml`, and what it writes for itself through :func:`dump_yaml`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from cluster.errors import ConfigError
from cluster.harmless import short

_DEEPEST = 100
_NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)

_TAG = "tag:yaml.org,2002:"
_CORE: tuple[tuple[str, str, str], ...] = (  # tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class DuplicateKeyError(ValueError):
    """A key that stands twice in one mapping; the message has both places."""


class _Loader(yaml.SafeLoader):
    """The core schema, and each key once. A tag of another schema is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                first = seen.setdefault((key.tag, key.value), key.start_mark)
                if first is not key.start_mark:
                    raise DuplicateKeyError(f"the key {short(key.value)} stands twice, {_both(first, key.start_mark)}")
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        return str(self.construct_scalar(node)).lower() == "true"


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


for _name, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), [c.replace("\0", "") for c in _first])
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), [c.replace("\0", "") for c in _first])
for _name in ("null", "str", "seq", "map"):
    _Loader.add_constructor(_TAG + _name, getattr(_Loader, f"construct_yaml_{_name}"))
_Loader.add_constructor(_TAG + "bool", _Loader.construct_bool)
_Loader.add_constructor(_TAG + "int", _Loader.construct_int)
_Loader.add_constructor(_TAG + "float", _Loader.construct_float)
_Loader.yaml_constructors[None] = _Loader.construct_undefined


def parse_yaml(text: str, where: str) -> Any:
    """Return the values of the one YAML document ``text``; raises ConfigError that begins with ``where``."""
    try:
        _refuse_depth(text)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except DuplicateKeyError as error:
        raise ConfigError(f"{where}: {error}") from error
    except _NOT_YAML as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error


def parse_value(text: str, where: str) -> Any:
    """Return the YAML value ``text`` of one line of a command; None where it is empty. Errors as :func:`parse_yaml`.

    A comment is an error: what looks like one is a part of a name that lacks its quotes.
    """
    value = parse_yaml(text, where)
    node = yaml.compose(text, Loader=_Loader)
    end = node.end_mark.index if node is not None else 0
    if text[end:].strip():
        raise ConfigError(
            f"{where}: YAML takes {short(text[end:].strip())} for a comment; put the whole value between quotes: {quoted(text)}"
        )
    return value


def dump_yaml(values: Any) -> str:
    """Return ``values`` as YAML that :func:`parse_yaml` reads back as they are, and so does YAML 1.1."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


def as_value(text: str) -> str:
    """Return ``text`` as a YAML value of one line: itself where YAML reads it back as that very text, else between quotes."""
    try:
        plain = parse_value(text, "")
    except ConfigError:
        plain = None
    return text if plain == text else quoted(text)


def quoted(text: str) -> str:
    """Return ``text`` as a YAML scalar between double quotes, in ASCII and on one line."""
    return yaml.dump(text, Dumper=_Dumper, default_style='"', width=float("inf")).strip()


def _refuse_depth(text: str) -> None:
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:  # PyYAML's time grows with the square of it
        raise ValueError(f"more than {_DEEPEST} brackets are open at once")


def _both(first: Any, second: Any) -> str:
    if first.line == second.line:
        return f"in columns {first.column + 1} and {second.column + 1} of line {first.line + 1}"
    return f"in lines {first.line + 1} and {second.line + 1}; write what belongs to it in one place"
