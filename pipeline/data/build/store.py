"""A build's work area, ``OUT/_build``: clips by their contents, and what is done already, by what it was made of.

Everything in it is written once and never changed: a file has its name only when it is whole, so that a process may be killed at
any moment. The area is a folder or a URI that all workers see. Not responsible for what keys are made of (``worker``, ``asking``).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from pipeline.support.location import Uri, facts_of, read_bytes, remove, write_bytes

AREA = "_build"  # below a build's OUT; readers of Parquet folders pass over names that begin with an underscore
FORMAT = 1  # of what is kept; part of every key


def digest_of(*parts: Any) -> str:
    """Return the sha256 of ``parts``, which are JSON values: the key of what was made of them."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class WorkArea:
    """The work area in ``folder``. Methods raise StorageError where a store fails."""

    folder: Path | Uri

    # --- clips ------------------------------------------------------------------------------------------------------

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its name, the sha256; a second call with the same bytes changes nothing."""
        name = hashlib.sha256(data).hexdigest()
        place = self._place("clips", name, "mp4")
        if not _exists(place):
            _write(place, data)
        return name

    def get(self, name: str) -> bytes:
        """Return the bytes of ``name``; raises DataError where they are gone or are others."""
        try:
            data = read_bytes(self._place("clips", name, "mp4"))
        except FileNotFoundError as error:
            raise DataError(
                f"the clip {name[:12]}… is gone from {self.folder}; delete that folder to begin anew"
            ) from error
        if hashlib.sha256(data).hexdigest() != name:
            raise DataError(f"the clip {name[:12]}… in {self.folder} is damaged; delete that folder to begin anew")
        return data

    # --- what is done -----------------------------------------------------------------------------------------------

    def read(self, kind: str, key: str) -> Any:
        """Return what was written as ``kind`` and ``key``, None where nothing was, or half of it (a machine lost its power)."""
        try:
            return json.loads(read_bytes(self._place(kind, key, "json")))
        except (FileNotFoundError, ValueError):
            return None

    def write(self, kind: str, key: str, values: Mapping[str, Any] | list[Any]) -> None:
        """Keep ``values`` as ``kind`` and ``key``; of two writers the later one's stay."""
        text = json.dumps(values, ensure_ascii=False)
        _write(self._place(kind, key, "json"), text.encode("utf-8", "backslashreplace"))

    def forget(self) -> None:
        """Remove the area with all that is in it."""
        remove(self.folder, folder=True)

    def _place(self, kind: str, key: str, suffix: str) -> Path | Uri:
        below = self.folder
        for part in (*kind.split("/"), key[:2]):
            below = below / part
        return below / f"{key}.{suffix}"


def _exists(place: Path | Uri) -> bool:
    if isinstance(place, Path):
        return place.is_file()
    return bool(facts_of(place).is_file)


def _write(place: Path | Uri, data: bytes) -> None:
    if isinstance(place, Uri):
        write_bytes(place, data)  # a store shows a file when all of it is there
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)
