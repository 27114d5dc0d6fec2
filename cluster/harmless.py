"""Text of strangers (captions, questions, ids, file names) on its way to a console, a table or a picture."""

from __future__ import annotations

import json
import re
import reprlib
import unicodedata
from typing import Any

_CREDENTIALS = re.compile(r"([A-Za-z][\w+.-]*://[^\s:/@]*):[^\s/]*@")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 120, 120


def printable(text: str, limit: int | None = None) -> str:
    """Return ``text`` with every control character but newline and tab made visible, ``limit`` characters at most.

    Terminal escapes, bidirectional overrides and lone surrogates become their code, such as ``\\x1b``: what is shown
    cannot move the cursor, colour the screen, turn the direction of the line, or fail to be encoded.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c in "\n\t" or not _controls(c) else c.encode("unicode_escape").decode() for c in text)


def in_markup(text: str) -> str:
    """Return ``text`` for a place inside rich's markup: printable, its brackets meaning nothing."""
    from rich.markup import escape

    return escape(printable(text))


def in_markdown(text: str) -> str:
    """Return ``text`` for a cell or a line of markdown: one line, without HTML, its bars meaning nothing."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def redacted(text: str) -> str:
    """Return ``text`` with the password of every ``scheme://user:password@host`` in it replaced by ``***``."""
    return _CREDENTIALS.sub(r"\1:***@", text)


def parse_json(text: str | bytes) -> Any:
    """Return the JSON value ``text``, written by a person; raises ValueError where it is none, or a key stands twice in an object."""
    return json.loads(text, object_pairs_hook=_each_key_once)


def file_slug(text: str, limit: int = 64) -> str:
    """Return ``text`` as a part of a file's name: ASCII letters, digits, ``-`` and ``_``, never empty."""
    return re.sub(r"[^\w-]+", "_", text, flags=re.ASCII)[:limit].strip("_") or "_"


def short(value: Any) -> str:
    """Return what ``value`` looks like, in bounded time and length whatever it is."""
    return redacted(printable(_SHORT.repr(value), 200))


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {short(twice)} stands twice in one object")
    return found


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
