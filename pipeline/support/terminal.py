"""What a person sees: this program's own words. What other libraries print goes to a log file, which an error names.

Within :func:`library_log` file descriptors 1 and 2 are the log, and so are ``sys.stdout`` and ``sys.stderr``: warnings, loggers,
C++ and every process that is started write there. Our words go to the terminal (or pipe, or file) that the command was started
with: through :func:`console`, and as warnings of our own loggers. Tracebacks of bugs are shown.

Outside the block, in tests and in programs that import ours, nothing is redirected. ``VANS_SHOW_LIBRARIES=1`` shows everything.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console

from cluster.harmless import printable, redacted
from cluster.session import PACKAGES

SHOW_ALL = "VANS_SHOW_LIBRARIES"
FILE = "libraries.log"
TAIL_LINES, TAIL_BYTES = 20, 1 << 16


class _LogFile(io.FileIO):
    """A file on whose full disk nobody fails: a warning that cannot be kept must not end a run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


class LibraryLog:
    """The log file of one command. It begins as a temporary file, and moves into the command's folder once that is known."""

    def __init__(self, command: str) -> None:
        handle, name = tempfile.mkstemp(prefix=f"{'-'.join(command.split())}-", suffix=".log")
        self.command, self.path = command, Path(name)
        self.stream = io.TextIOWrapper(
            io.BufferedWriter(_LogFile(handle, "w")), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        self.handles = [handle]  # descriptors that are this file
        self._temporary, self._begin = True, 0
        self._wanted = False

    def keep_in(self, folder: Path) -> None:
        """Go on in ``folder``, after what earlier commands wrote there; the first folder that can be written to stays."""
        if not self._temporary:
            return
        self.stream.flush()
        try:
            said = self.path.read_bytes()
            with (folder / FILE).open("ab") as file:
                file.write(f"--- {self.command}, process {os.getpid()}, {time.strftime('%F %T %z')}\n".encode())
                begin = file.tell()
                file.write(said)
                file.flush()
                for handle in self.handles:
                    os.dup2(file.fileno(), handle, inheritable=handle <= 2)
        except OSError:  # the temporary one serves
            return
        self.path.unlink(missing_ok=True)
        self.path, self._temporary, self._begin = folder / FILE, False, begin

    def said(self) -> list[str]:
        """Return the last lines that libraries printed during this command."""
        self.stream.flush()
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                return file.read().decode("utf-8", "backslashreplace").splitlines()
        except OSError:
            return []

    def explain(self, error: Exception, *, tail: bool) -> None:
        """Add to ``error`` where the libraries' output is; with ``tail`` also its last lines, for a log that outlives this machine."""
        lines = [line for line in self.said() if line.strip()]
        if lines:
            self._wanted = True
            note = f"other libraries' output is in {self.path}"
            if tail:
                note += "; its last lines:\n" + "\n".join(
                    f"  {redacted(printable(line))}" for line in lines[-TAIL_LINES:]
                )
            error.add_note(note)

    def close(self) -> None:
        """End; a temporary file that no error names is removed."""
        self.stream.flush()
        if self._temporary and not self._wanted:
            self.path.unlink(missing_ok=True)


class _Shown:
    """The streams that a person sees while they are not ``sys.stdout`` and ``sys.stderr``."""

    def __init__(self, log: LibraryLog, out: TextIO, err: TextIO) -> None:
        self.log, self.out, self.err = log, out, err
        self.live: list[Console] = []  # consoles that draw a bar


_shown: _Shown | None = None


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a console for our own words, on standard output or standard error."""
    stream = None if _shown is None else _shown.err if stderr else _shown.out
    return Console(file=stream, stderr=stderr, width=width)


def alert(text: str) -> None:
    """Write ``text`` to standard error at once, from a signal's handler."""
    stream = sys.stderr if _shown is None else _shown.err
    try:
        handle = stream.fileno()
    except (AttributeError, OSError, ValueError):  # a stream in memory
        handle = 2
    os.write(handle, text.encode())


@contextmanager
def drawing(on: Console) -> Iterator[bool]:
    """Yield whether a live display on ``on`` is to take up what is printed meanwhile; our warnings go above what it draws."""
    if (shown := _shown) is None or not on.is_terminal:
        yield True
        return
    shown.live.append(on)
    try:
        yield False
    finally:
        shown.live.remove(on)


def keep_log_in(folder: Path) -> None:
    """Let the log of the command that is running, if it has one, be ``folder``/libraries.log."""
    if _shown is not None:
        _shown.log.keep_in(folder)


@contextmanager
def library_log(command: str) -> Iterator[LibraryLog | None]:
    """Send what other libraries print within the block to a log file; None where that is off or there is no place for it.

    Descriptors that were redirected stay so, because libraries also print while the process ends.
    """
    global _shown
    log = _open(command)
    if log is None:
        yield None
        return
    before = sys.stdout, sys.stderr
    out, err = (_redirected(log, stream, handle) for handle, stream in enumerate(before, start=1))
    _shown = _Shown(log, out, err)
    if 2 in log.handles and not faulthandler.is_enabled():
        faulthandler.enable(err)
    sys.stdout = sys.stderr = log.stream
    root, handlers, hook = logging.getLogger(), (_OurWarnings(), _foreign(log)), threading.excepthook
    for handler in handlers:
        root.addHandler(handler)
    threading.excepthook = _thread_failed
    try:
        yield log
    finally:
        threading.excepthook = hook
        for handler in handlers:
            root.removeHandler(handler)
        sys.stdout, sys.stderr, _shown = out, err, None
        log.close()


def _open(command: str) -> LibraryLog | None:
    if os.environ.get(SHOW_ALL, "0") not in ("", "0") or _shown is not None:
        return None
    try:
        return LibraryLog(command)
    except OSError:  # no folder for temporary files, or its disk is full
        return None


def _redirected(log: LibraryLog, stream: TextIO, handle: int) -> TextIO:
    """Make ``handle`` the log if ``stream`` writes to it, and return a stream to where it led; any other stream is left alone."""
    try:
        if stream.fileno() != handle:
            return stream
    except (AttributeError, OSError, ValueError):  # closed, or in memory
        return stream
    stream.flush()
    kept = os.fdopen(os.dup(handle), "w", encoding=stream.encoding, errors="backslashreplace", buffering=1)
    os.dup2(log.stream.fileno(), handle)
    log.handles.append(handle)
    return kept


def _foreign(log: LibraryLog) -> logging.Handler:
    handler = logging.StreamHandler(log.stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.name.split(".")[0] not in PACKAGES)
    return handler


class _OurWarnings(logging.Handler):
    """Shows warnings of our own loggers, and errors of asyncio that come out of our code."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] not in PACKAGES and not (record.exc_info and _is_ours(record.exc_info[2])):
            return
        try:
            _show(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler of logging does: a lost line must not end a run
            self.handleError(record)


def _show(text: str) -> None:
    shown = _shown
    on = shown.live[-1] if shown is not None and shown.live else console(stderr=True)
    on.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Log the error that ended a thread, and show it where it comes out of our code."""
    if failed.exc_value is None or issubclass(failed.exc_type, SystemExit):
        return
    text = "".join(traceback.format_exception(failed.exc_value))
    sys.stderr.write(text)
    if _is_ours(failed.exc_traceback):
        _show(text)


def _is_ours(found: TracebackType | None) -> bool:
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(found))
    return any(str(name).split(".")[0] in PACKAGES for name in names)
