"""Which errors mean that a file could not be written: a full disk, a limit, a device that fails.

Libraries that write through C++ or Rust wrap the system's error in one of their own, so its text is looked at too.
"""

from __future__ import annotations

import re

_WORDS = re.compile(
    r"No space left|File too large|Input/output error|Disk quota exceeded|Read-only file system|os error (5|27|28|30|122)\b"
    r"|PytorchStreamWriter failed|unexpected pos|iostream error",
    re.IGNORECASE,
)


def write_failure(error: BaseException) -> str | None:
    """Return in one line why writing failed, None where ``error`` is about something else."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        text = str(cause)
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError):
            return _line(text)
        if _WORDS.search(text):
            return _line(text)
        cause = cause.__cause__ or cause.__context__
    return None


def disk_error(error: BaseException) -> str | None:
    """Return what a person is told of a file that cannot be written or read, with the cure; None where ``error`` is something else."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return None
    told, where = error.strerror or _line(str(error)), f"{error.filename}: " if error.filename else ""
    for words, cure in _CURES:
        if re.search(words, told, re.IGNORECASE):
            return f"{where}{told}; {cure}"
    return None


_CURES = (
    ("no space left|quota exceeded|disk is full", "make room there, or write to another folder"),
    ("read-only file system", "write to another folder (out=…, --out)"),
    ("permission denied|not permitted", "correct the rights of that folder, or name another one"),
    ("file name too long", "choose a shorter name"),
    ("file too large|input/output error", "the disk refuses it: look at its limits (ulimit -f) and its health"),
    ("too many open files", "raise the limit, for example: ulimit -n 65536"),
)


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if _WORDS.search(line)), lines[0] if lines else "no reason given")[:300]
