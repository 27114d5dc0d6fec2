"""Taking a lock, keeping it, and giving it back.

A living owner is named in the error. A dead one is known at once on its own machine, where its process is gone; elsewhere its lock
is watched for STALE_S, within which a living one shows several signs of life. Whoever is taken over while it was suspended learns
that before it writes the next checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from cluster.errors import ConfigError, StorageError, VansError
from pipeline.lock.owner import Owner
from pipeline.lock.slots import FolderSlot, StoreSlot
from pipeline.support.location import Uri, opened

BEAT_S = 5.0
STALE_S = 60.0
"""A lock of another machine that shows no sign of life for so long is a dead one's."""
POLL_S = 0.5
QUEUED_WAIT_S = 600.0
"""Longest wait of a job that was queued again (``--resume-if-any``) for the one before it, which may be writing its last checkpoint."""

log = logging.getLogger(__name__)
Tell = Callable[[str], object]


class InUseError(VansError):
    """Another process, which lives, writes into the folder."""


class LockLostError(VansError):
    """Another process has taken the folder over; this one must not write into it any more."""


class Lock:
    """A lock that this process holds; a thread of its own gives the signs of life."""

    def __init__(self, slot: FolderSlot | StoreSlot, owner: Owner, name: str) -> None:
        self.slot, self.owner, self.name = slot, owner, name
        self._lost = ""
        self._ended = threading.Event()
        self._turn = threading.RLock()
        self._thread = threading.Thread(target=self._beats, name="lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise LockLostError where another process has taken the lock over. A place that does not answer proves nothing."""
        with suppress(OSError, StorageError):
            self._look()
        if self._lost:
            raise LockLostError(
                f"{self.name} has been taken over by {self._lost}. This process did not answer for longer than {STALE_S:.0f} s (it "
                "was suspended, or its machine was cut off), and ends without writing anything more"
            )

    def release(self) -> None:
        """Give the lock back; one that was lost is left to its owner."""
        self._ended.set()
        self._thread.join(timeout=2 * BEAT_S)
        try:
            if self._mine():
                self.slot.remove()
        except (OSError, StorageError) as error:
            log.warning("%s could not be removed: %s", self.slot, error)
        finally:
            self.slot.close()

    def _mine(self) -> bool:
        found = self.slot.read()
        return found is not None and Owner.parse(found).token == self.owner.token

    def _look(self) -> None:
        with self._turn:
            found = self.slot.read()
            if found is None:  # removed by hand
                if not self._ended.is_set() and self.slot.create(self.owner.content()):
                    return
                found = self.slot.read()
            if found is not None:
                other = Owner.parse(found)
                self._lost = "" if other.token == self.owner.token else str(other)

    def _beats(self) -> None:
        told = False
        while not self._ended.wait(BEAT_S):
            try:
                with self._turn:
                    self._look()
                    if not self._lost and not self._ended.is_set():
                        self.owner = self.owner.after_a_beat()
                        self.slot.overwrite(self.owner.content())
                told = False
            except (OSError, StorageError) as error:
                if not told:
                    log.warning("the lock %s cannot be kept up to date: %s", self.slot, error)
                told = True


_HELD: dict[str, tuple[Lock, int]] = {}  # by the place's name; how many blocks of this process hold it
_ONE = threading.RLock()


def held(folder: Path) -> Lock | None:
    """Return the lock of ``folder`` where this process holds it."""
    with _ONE:
        return _HELD.get(_key(folder), (None, 0))[0]


@contextmanager
def hold(
    place: Path | Uri, what: str, *, name: str = "", wait_s: float = 0.0, tell: Tell = lambda line: None
) -> Iterator[Lock]:
    """Hold the folder or store ``place`` for the block; a block inside another of the same process shares its lock.

    ``what`` names the command, ``name`` the place, in messages (``out=runs/x``). A folder that is not there is made, and removed
    again if nothing was written into it. A living owner is waited for ``wait_s`` at most; ``tell`` gets a line when there is
    something to wait for. Raises InUseError, ConfigError where the folder cannot be written to, StorageError.
    """
    if isinstance(place, Uri) and place.scheme == "file":
        place = Path(opened(place)[1])
    key, name = _key(place), name or str(place)
    with ExitStack() as stack:
        if isinstance(place, Path):
            stack.enter_context(_folder(place, name))
        with _ONE:
            lock, count = _HELD.get(key, (None, 0))
            if lock is None:
                slot = FolderSlot(place) if isinstance(place, Path) else StoreSlot(place)
                try:
                    lock = _taken(slot, Owner.here(what), name, wait_s, tell)
                except OSError as error:
                    raise _unwritable(name, error) from error
                except StorageError as error:
                    raise StorageError(f"{name.partition('=')[0]}: {error}") from error
            _HELD[key] = lock, count + 1
        try:
            with _released_by_sigterm(lock):
                yield lock
        finally:
            with _ONE:
                _, count = _HELD[key]
                if count > 1:
                    _HELD[key] = lock, count - 1
                else:
                    del _HELD[key]
                    lock.release()


@contextmanager
def hold_all(
    places: dict[str, Path | Uri], what: str, *, wait_s: float = 0.0, tell: Tell = lambda line: None
) -> Iterator[Callable[[], None]]:
    """Hold all of ``places``, by their names in messages; yields a function that raises LockLostError where one was lost."""
    with ExitStack() as stack:
        locks = [
            stack.enter_context(hold(place, what, name=name, wait_s=wait_s, tell=tell))
            for name, place in places.items()
        ]

        def require() -> None:
            for lock in locks:
                lock.require()

        yield require


def require_token(folder: Path, token: str) -> None:
    """Raise LockLostError where ``folder`` is another's than the one with ``token``: for a process that works for the holder."""
    found = FolderSlot(folder).read()
    if found is not None and (other := Owner.parse(found)).token != token:
        raise LockLostError(f"{folder} has been taken over by {other}; nothing more is written into it from here")


def _taken(slot: FolderSlot | StoreSlot, owner: Owner, name: str, wait_s: float, tell: Tell) -> Lock:
    """Return the lock, taken for ``owner``; raises InUseError."""
    deadline, told = time.monotonic() + wait_s, False
    while True:
        found = slot.read()
        if found is None:
            if slot.create(owner.content()):
                return Lock(slot, owner, name)
            time.sleep(POLL_S / 10)
            continue
        other = Owner.parse(found)
        if _dead(slot, other, found, name, tell):
            if slot.replace(other, owner.content()):
                tell(f"{name}: taken over from {other}, which has ended without saying so")
                return Lock(slot, owner, name)
            time.sleep(POLL_S)
            continue
        if (found := slot.read()) is None or Owner.parse(found).token != other.token:
            continue
        if time.monotonic() >= deadline:
            waited = f" (waited {wait_s:.0f} s)" if wait_s else ""
            raise InUseError(
                f"{name} is in use by {other}{waited}. Wait for it to end, or stop it, or choose another folder. If you know that it "
                f"has ended, remove {slot}"
            )
        if not told:
            tell(f"{name} is in use by {other}; waiting {wait_s:.0f} s at most for it to end")
            told = True
        time.sleep(POLL_S)


def _dead(slot: FolderSlot | StoreSlot, other: Owner, found: bytes, name: str, tell: Tell) -> bool:
    """Return whether ``other`` has ended; where this machine cannot tell, its lock is watched for a sign of life."""
    state = other.liveness()
    if (
        other.pid == os.getpid() and state == "alive"
    ):  # of a block of this process; it may have ended, and the removal failed
        return other.token not in {lock.owner.token for lock, _ in _HELD.values()}
    if state != "unknown":
        return state == "dead"
    tell(f"{name} has the lock of {other}; waiting {STALE_S:.0f} s at most for another sign of life")
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(min(POLL_S, STALE_S))
        if slot.read() != found:
            return False
    return True


def _key(place: Path | Uri) -> str:
    return str(place) if isinstance(place, Uri) else str(place.resolve())


@contextmanager
def _folder(folder: Path, name: str) -> Iterator[None]:
    """Make ``folder`` for the block; what was made, and holds nothing at the block's end, goes again."""
    made: list[Path] = []
    try:
        for path in (folder, *folder.parents):
            if path.exists():
                break
            made.append(path)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(name, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _unwritable(name: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{name} cannot be written to: {error.strerror or error}; make room, correct its rights, or choose another folder"
    )


@contextmanager
def _released_by_sigterm(lock: Lock) -> Iterator[None]:
    """Give ``lock`` back before SIGTERM ends the process, where nobody else handles it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        with suppress(OSError, StorageError):
            if lock._mine():
                lock.slot.remove()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
