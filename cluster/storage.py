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


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if _WORDS.search(line)), lines[0] if lines else "no reason given")[:300]
