"""Delivers tracking records in order from a thread of its own, so that a slow or dead store never holds up a step.

Records are dictionaries that JSON can hold. While the store cannot be reached they are appended to a spool file; when it
answers again the spool is delivered first. Where the spool's disk is full they wait in memory. What is left when the run
ends stays in the spool and is counted.
This module knows neither MLflow nor metrics: ``deliver`` says how, and raises :class:`Unreachable` to have it tried again.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
log = logging.getLogger(__name__)


class Unreachable(Exception):
    """The store did not take a record for a reason that may pass."""


@dataclass
class OutboxCounts:
    """What became of the records so far."""

    delivered: int = 0
    spooled: int = 0  # in the spool now
    rejected: int = 0  # refused for good; each is in the log and in the rejects file


@dataclass
class _Entry:
    record: Record
    prepare: Callable[[], object] | None = None


class Outbox:
    """A queue with a delivering thread and a spool file.

    ``merge(records)`` may join neighbouring records to save calls; ``retry_s`` is the pause between attempts to reach a
    dead store.
    """

    def __init__(
        self,
        deliver: Callable[[Record], None],
        spool: Path,
        *,
        merge: Callable[[list[Record]], list[Record]] = list,
        retry_s: float = 10.0,
    ) -> None:
        self._deliver, self._merge = deliver, merge
        self.spool, self.rejects = spool, spool.with_name(spool.stem + "_rejected.jsonl")
        self._retry_s = retry_s
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._next_try = 0.0
        self._abandoned = False  # the thread hangs in a call; its records were spooled without it
        self._files = threading.Lock()
        self._current: list[Record] = []
        self._unwritten: list[Record] = []  # for the spool, whose disk is full: kept in memory and tried again
        self._unfinished = 0
        self._idle = threading.Condition()
        left = self._spooled()
        if left:  # of an earlier process; written anew, because a kill may have cut its last line short
            _write_lines(spool, left, "w")
        self.counts = OutboxCounts(spooled=len(left))
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def put(self, record: Record, prepare: Callable[[], object] | None = None) -> None:
        """Queue ``record`` and return at once; ``prepare`` (writing the file it names) runs in the thread before it."""
        with self._idle:
            self._unfinished += 1
        self._queue.put(_Entry(record, prepare))

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything put so far is delivered or spooled; False where ``timeout_s`` passed first."""
        with self._idle:
            return self._idle.wait_for(lambda: self._unfinished == 0, timeout_s)

    def close(self, timeout_s: float = 30.0) -> int:
        """Deliver what can be delivered within ``timeout_s``; returns the number of records left in the spool."""
        self._next_try = 0.0  # the last chance does not wait for the next attempt's turn
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._abandon()
        if self.counts.spooled:
            log.error("%d tracking records could not be delivered; they are in %s", self.counts.spooled, self.spool)
        if self._unwritten:
            log.error("%d tracking records are lost: neither store nor spool took them", len(self._unwritten))
        return self.counts.spooled

    def _abandon(self) -> None:
        """Spool, from the caller's thread, what the hanging thread has not finished."""
        with self._files:
            self._abandoned = True
        entries = []
        while not self._queue.empty():
            entries.append(self._queue.get())
        waiting = [entry.record for entry in entries if entry is not None and self._prepared(entry)]
        _write_lines(self.spool, self._current + waiting, "a")
        self.counts.spooled += len(self._current) + len(waiting)

    def _run(self) -> None:
        closing = False
        while not closing:
            entries, closing = self._take()
            try:
                records = self._merge([e.record for e in entries if self._prepared(e)])
                self._process(self._unwritten + records, last=closing)
            except OSError as error:  # the thread must outlive a full disk; the spool stays as it was
                log.error("the tracking spool %s cannot be written: %s", self.spool, error)
            finally:
                with self._idle:
                    self._unfinished -= len(entries)
                    self._idle.notify_all()

    def _take(self) -> tuple[list[_Entry], bool]:
        """Everything in the queue, at least one entry unless a retry is due; True where the queue was closed."""
        entries: list[_Entry] = []
        timeout: float | None = self._retry_s if self.counts.spooled or self._unwritten else None
        while True:
            try:
                entry = self._queue.get(timeout=timeout) if not entries else self._queue.get_nowait()
            except queue.Empty:
                return entries, False
            if entry is None:
                return entries, True
            entries.append(entry)

    def _prepared(self, entry: _Entry) -> bool:
        if entry.prepare is None:
            return True
        try:
            entry.prepare()
        except Exception as error:  # noqa: BLE001 - a picture that cannot be drawn must not end the run; it is reported
            self._reject(entry.record, error)
            return False
        return True

    def _process(self, records: list[Record], last: bool) -> None:
        self._unwritten = []
        if self.counts.spooled:
            self._append(records)
            if last or time.monotonic() >= self._next_try:
                self._replay()
            return
        self._current = list(records)
        while self._current and self._sent(self._current[0]):
            self._current.pop(0)
        self._append(self._current)
        self._current = []

    def _replay(self) -> None:
        """Deliver the spool in order; what still cannot be delivered stays."""
        records = self._merge(self._spooled())
        sent = 0
        for record in records:
            if not self._sent(record):
                break
            sent += 1
        self._rewrite(records[sent:])
        if sent == len(records):
            log.info("the tracking store answers again: %d spooled records delivered", sent)

    def _sent(self, record: Record) -> bool:
        """Deliver one record; False where the store cannot be reached now."""
        try:
            self._deliver(record)
        except Unreachable as error:
            if time.monotonic() >= self._next_try:
                log.warning("tracking store unreachable, records go to %s: %s", self.spool, error)
            self._next_try = time.monotonic() + self._retry_s
            return False
        except Exception as error:  # noqa: BLE001 - tracking must not end a run; the record is kept and reported
            self._reject(record, error)
            return True
        self.counts.delivered += 1
        return True

    def _reject(self, record: Record, error: Exception) -> None:
        self.counts.rejected += 1
        log.error("the tracking store refused a record (kept in %s): %s", self.rejects, error)
        _write_lines(self.rejects, [record | {"error": f"{type(error).__name__}: {error}"}], "a")

    def _append(self, records: list[Record]) -> None:
        with self._files:
            if records and not self._abandoned:
                try:
                    _write_lines(self.spool, records, "a")
                except OSError:
                    self._unwritten = records
                    raise
                self.counts.spooled += len(records)

    def _rewrite(self, records: list[Record]) -> None:
        with self._files:
            if self._abandoned:  # others have written to the spool meanwhile; better twice than not at all
                return
            beside = self.spool.with_suffix(".new")
            _write_lines(beside, records, "w")
            os.replace(beside, self.spool)
            if not records:
                self.spool.unlink()
            self.counts.spooled = len(records)

    def _spooled(self) -> list[Record]:
        if not self.spool.is_file():
            return []
        records = []
        for line in self.spool.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # a killed process leaves at most a part of its last line
                log.warning("%s: skipping a line that was cut short", self.spool)
        return records


def _write_lines(path: Path, records: Iterable[Record], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if mode == "a" and path.is_file() else 0
    try:
        with path.open(mode, encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if path.is_file():
            os.truncate(path, before)  # a part of a line would spoil the next one
        raise
