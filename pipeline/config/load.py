"""Read a run's YAML, apply dotted overrides, and turn every mistake into one line: key, value, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cluster.errors import ConfigError
from cluster.harmless import short
from pipeline.config.schema import RunConfig
from pipeline.config.yaml12 import as_value, dump_yaml, parse_value, parse_yaml
from pipeline.support.location import local_path

BUNDLED = Path(__file__).parent / "runs"
Model = TypeVar("Model", bound=BaseModel)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run described by ``source`` with ``overrides`` such as ``stage1.rollout.group_size=4``.

    ``source`` is a YAML file, or the name of a bundled run (``toy``). Its key ``base`` may name another, a path being
    relative to the file itself: the file then says what it changes of that run. Values of overrides are YAML; of two for one
    key the later counts. Raises ConfigError with one line per mistake.
    """
    values = _read(find_config(source))
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, where=str(source))


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of ``path`` over those of its base; ``below`` are the files that name it as theirs."""
    chain = (*below, path.resolve())
    values = read_mapping(path, "run")
    if "base" not in values:
        return values
    name = values.pop("base")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: base={short(name)}: give the name of a bundled run or the path of a YAML file")
    beside = path.parent / Path(name).expanduser()
    try:
        base = find_config(beside if beside.is_file() else name)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{path}: base={short(name)}: {error}") from error
    if base.resolve() in chain:
        circle = " -> ".join(str(file) for file in (*chain, base.resolve()))
        raise ConfigError(f"{path}: base={short(name)}: these runs are each other's base: {circle}")
    return merge(_read(base, chain), values)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the keys and values of the YAML file ``path``, which describes a ``what``; raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    values = parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of sections, found {type(values).__name__}")
    return values


def merge(base: dict[str, Any], changes: dict[str, Any], location: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return ``base`` with ``changes``: sections key by key, any other value (a list, the rewards' weights) as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        here, old = (*location, str(key)), merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and _known_keys(here):
            merged[key] = merge(old, value, here)
        else:
            merged[key] = value
    return merged


def find_config(source: str | Path) -> Path:
    """Return the YAML file that ``source`` names: a path, or a bundled run without its suffix."""
    return find_yaml(source, BUNDLED, "configuration", "runs")


def find_yaml(source: str | Path, folder: Path, what: str, many: str) -> Path:
    """Return the file that ``source`` names: a path, or a YAML file in ``folder`` without its suffix.

    Raises ConfigError, which calls such a file a ``what`` and those in ``folder`` the bundled ``many``.
    """
    path = local_path(source)
    bundled = folder / f"{source}.yaml"
    try:
        if path.is_file():
            return path
        if path.parent == Path(".") and bundled.is_file():
            return bundled
    except OSError as error:  # a name that is too long
        raise ConfigError(f"no {what} {short(str(source))}: {error.strerror}") from error
    names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise ConfigError(f"no {what} {str(source)!r}: not a file, and not one of the bundled {many} ({names})")


def parse_config(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """Validate ``values``; raises ConfigError that lists every mistake."""
    return parse_section(RunConfig, values, where)


def parse_section(model: type[Model], values: dict[str, Any], where: str, prefix: str = "") -> Model:
    """Return ``values`` as a ``model``; raises ConfigError that begins with ``where`` and lists every mistake.

    ``prefix`` stands before each key that it names, such as ``stages.cut.`` where ``values`` are a part of the file.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, model, prefix) for detail in error.errors()]
        raise ConfigError(f"{where}: " + (lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines))) from error


def apply_override(values: dict[str, Any], override: str, model: type[BaseModel] = RunConfig) -> None:
    """Set one ``section.key=value`` of a ``model`` in ``values`` in place."""
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override {override!r}: expected section.key=value, e.g. stage1.rollout.group_size=4")
    value = parse_value(text, f"override {override!r}")
    *parents, leaf = key.strip().split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        field = model.model_fields.get(name) if node is values else None
        scalar = field is not None and not _known_keys((name,), model) and get_origin(field.annotation) is not dict
        if scalar or not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
        node = child
    node[leaf] = value


def override_of(key: str, text: object) -> str:
    """Return the override that sets ``key`` to ``text``, whatever characters it has; a path is text."""
    return f"{key}={as_value(str(text))}"


def run_name(text: str) -> str:
    """Return ``text``, such as a folder's name, as a run may be called: ASCII, and no more than that."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("-_.") or "run"


def flatten(config: BaseModel) -> dict[str, Any]:
    """Return ``config`` as dotted keys, for MLflow parameters."""

    def walk(prefix: str, node: Any) -> dict[str, Any]:
        if isinstance(node, dict) and node:
            return {k: v for name, child in node.items() for k, v in walk(f"{prefix}{name}.", child).items()}
        return {prefix.rstrip("."): node}

    return walk("", config.model_dump(mode="json"))


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML."""
    return dump_yaml(config.model_dump(mode="json"))


def _explain(detail: Any, model: type[BaseModel], prefix: str) -> str:
    location = tuple(part for part in detail["loc"])
    key = prefix + ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r} (value {short(detail['input'])}); {hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key + ': ' if key else ''}{message}"
    return f"{key}={short(detail['input'])}: {message}{_cure(detail)}"


def _cure(detail: Any) -> str:
    """Return what would be right where a value has another type than it looks as if it had."""
    value, wanted = detail["input"], detail["type"].partition("_")[0]
    if wanted in ("int", "float") and isinstance(value, bool | str):
        what = "text" if isinstance(value, str) else "true or false"
        return f"; this is {what}. Numbers are written without quotes, and in decimal: 1000, 0.5, 1e-5"
    if wanted == "int" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if wanted == "bool":
        return "; write true or false"
    if wanted == "string" and not isinstance(value, dict | list) and value is not None:
        return "; write it between quotes"
    return ""


def _known_keys(location: tuple[Any, ...], model: Any = RunConfig) -> list[str]:
    rest = list(location)
    while rest:
        field = (
            model.model_fields.get(rest.pop(0)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        )
        if field is None:
            return []
        model = field.annotation
        if get_origin(model) is dict and rest:  # sections by a name of the reader's
            rest.pop(0)
            model = get_args(model)[1]
        for candidate in get_args(model):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
