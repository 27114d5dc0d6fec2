"""Values that stand as literals in other people's Python files. The files are parsed and never imported, so nothing in them runs."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

_NUMBERS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LARGEST = 4 * 2**20  # bytes; the largest file that is read has 60 KB


class NotThereError(LookupError):
    """The file has no such name."""


class NotLiteralError(ValueError):
    """The name is there, but its value is computed."""


@dataclass(frozen=True)
class Place:
    """Where a value stands.

    ``function`` is a function's dotted name (``Class.method``), or empty for the file itself. The others say what is looked up in it,
    one of three: the default of a ``parameter``; what a ``variable`` is first set to; the ``argument`` (a keyword, or the number of
    a positional one) of the first ``call`` of a function with that name.
    """

    function: str = ""
    parameter: str = ""
    variable: str = ""
    call: str = ""
    argument: str | int = ""

    def __str__(self) -> str:
        inside = f" in {self.function}" if self.function else ""
        if self.parameter:
            return f"{self.function}({self.parameter})"
        if self.variable:
            return f"{self.variable}{inside}"
        return f"{self.call}({self.argument}){inside}"


@dataclass(frozen=True)
class Source:
    """One file of the folder ``root``."""

    root: Path
    file: str

    def read(self, place: Place) -> Any:
        """Return the literal at ``place``: a number, text, list or dictionary; products and sums of numbers are worked out.

        Raises:
            CheckpointError: the file is missing, or is no Python.
            NotThereError: it has no such function, name or call.
            NotLiteralError: the value is an expression.
        """
        inside = self._function(place.function) if place.function else self._tree
        if place.parameter:
            return _value(_default(inside, place.parameter))
        found = _set(inside, place.variable) if place.variable else _argument(inside, place.call, place.argument)
        return _value(found)

    @cached_property
    def _tree(self) -> ast.Module:
        path = self.root / self.file
        if not path.is_file():
            raise CheckpointError(f"{self.root} has no file {self.file}")
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError(f"it has more than {_LARGEST >> 20} MiB")
            return ast.parse(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"{path} cannot be read as Python: {error}") from error

    def _function(self, dotted: str) -> ast.AST:
        node: ast.AST = self._tree
        for name in dotted.split("."):
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [n for n in getattr(node, "body", ()) if isinstance(n, kinds) and n.name == name]
            if not found:
                raise NotThereError(dotted)
            node = found[0]
        return node


def _default(function: ast.AST, parameter: str) -> ast.expr:
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        raise NotThereError(parameter)
    arguments = function.args
    placed = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(placed) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip([*placed, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True):
        if argument.arg == parameter and default is not None:
            return default
    raise NotThereError(parameter)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        yield from _in_order(child)


def _set(inside: ast.AST, variable: str) -> ast.expr:
    for node in _in_order(inside):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == variable for t in targets):
            value = node.value  # type: ignore[attr-defined]
            if value is not None:
                return value  # type: ignore[no-any-return]
    raise NotThereError(variable)


def _argument(inside: ast.AST, call: str, argument: str | int) -> ast.expr:
    for node in _in_order(inside):
        if not isinstance(node, ast.Call) or _called(node.func) != call:
            continue
        if isinstance(argument, int):
            if argument < len(node.args):
                return node.args[argument]
        elif found := [k.value for k in node.keywords if k.arg == argument]:
            return found[0]
    raise NotThereError(f"{call}({argument})")


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _value(node: ast.expr) -> Any:
    try:
        return _number(node) if isinstance(node, ast.BinOp) else ast.literal_eval(node)
    except (ValueError, TypeError, ArithmeticError, SyntaxError, MemoryError, RecursionError) as error:
        raise NotLiteralError(ast.unparse(node)[:200]) from error


def _number(node: ast.expr) -> int | float:
    if isinstance(node, ast.BinOp) and type(node.op) in _NUMBERS:
        return _NUMBERS[type(node.op)](_number(node.left), _number(node.right))  # type: ignore[no-any-return]
    value = ast.literal_eval(node)
    if not isinstance(value, int | float):
        raise TypeError(type(value).__name__)
    return value
